"""Fingerprints: equal for the same data, however shared; different for others."""

import numpy as np
import pytest

from openreml_nn.data import MixedModel, read_table
from openreml_nn.lightning.batches import Batch
from openreml_nn.lightning.fingerprints import difference, fingerprint, require_same_data, row_sum


@pytest.fixture
def model():
    return MixedModel("sleepstudy", "Reaction ~ Days", ["Subject"])


def test_what_differs(model):
    before = fingerprint(Batch(model.y, model.X), model.V)
    assert list(before) == [
        "number of rows", "the response", "the fixed effects", "the term 'Subject'", "the term 'residual'",
    ]  # fmt: skip
    require_same_data(before, fingerprint(Batch(model.y.clone(), model.X.clone()), model.V))
    with pytest.raises(ValueError, match="of a fit to other data: the fixed effects differ"):
        require_same_data(before, fingerprint(Batch(model.y, model.X + 1.0), model.V))
    shorter = fingerprint(Batch(model.y[1:], model.X[1:]), model.V)
    assert difference(before, shorter) == "it had 180 rows, this table has 179"


def test_own_rows_add_up_in_any_order(model):
    whole = fingerprint(Batch(model.y, model.X, V=model.V), model.V)
    assert list(whole) == ["number of rows", "the response", "the fixed effects", "the term 'Subject'", "the rows"]
    place = np.random.default_rng(0).permutation(180)
    part, _ = model.part(place)
    assert fingerprint(Batch(part.y, part.X, V=part.V), model.V) == whole
    torn = fingerprint(Batch(model.y, part.X, V=model.V), model.V)
    assert difference(whole, torn) == "the rows differ"
    others = read_table("sleepstudy").replace({"Subject": {"S308": "S300"}})
    other = MixedModel(others, "Reaction ~ Days", ["Subject"])
    changed = fingerprint(Batch(other.y, other.X, V=other.V), other.V)
    assert difference(whole, changed) == "the term 'Subject' and the rows differ"


def test_sums_of_rows_add_up():
    columns = np.random.default_rng(0).integers(0, 2**64, (3, 180), dtype=np.uint64)
    parts = [row_sum(part) for part in np.split(columns, [50, 150], axis=1)]
    assert sum(parts) % 2**64 == row_sum(columns)
    assert row_sum(columns) != row_sum(columns[::-1])
    assert row_sum(columns) != row_sum(columns[:2])
