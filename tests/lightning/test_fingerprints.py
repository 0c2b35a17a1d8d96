"""Fingerprints: equal for the same data, however shared; different for others."""

import pytest
import torch

from openreml_nn.data import MixedModel
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
    place = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    shuffled = fingerprint(Batch(model.y[place], model.X[place], V=model.V), model.V)
    assert shuffled == whole
    torn = fingerprint(Batch(model.y, model.X[place], V=model.V), model.V)
    assert difference(whole, torn) == "the rows differ"
    rows = torch.cat([model.y[:, None], model.X], dim=1)
    assert sum(row_sum(part) for part in rows.split([50, 100, 30])) % 2**64 == row_sum(rows)
    assert row_sum(rows) != row_sum(rows.flip(1))
    assert row_sum(rows) != row_sum(rows[:1])
