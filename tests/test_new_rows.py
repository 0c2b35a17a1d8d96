"""Rows of new levels whose variance is not told are warned of, once for all terms."""

import warnings

import pytest
import torch

from openreml_nn.covariance import DummyMatrix, SimpleMatrix
from openreml_nn.new_rows import warn_of_new_levels
from openreml_nn.solvers.ranks import ALONE


def test_terms_and_rows_are_named_in_one_warning() -> None:
    site = DummyMatrix(["a", "c", "d"], levels=["a", "b"], unknown="zero")
    dense = SimpleMatrix(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, -1.0]], dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"term 'site' \(2 of 3\), 'line' \(1 of 3\) and no `unseen`") as found:
        warn_of_new_levels({"site": site, "plot": DummyMatrix(["a", "b", "b"]), "line": dense}, ALONE)
    assert len(found) == 1


def test_a_covariate_of_zero_is_no_new_level() -> None:
    slope = DummyMatrix(["a", "b"], levels=["a", "b"])
    slope.values = torch.zeros(2, 1, dtype=torch.float64)
    assert not slope().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_new_levels({"slope": slope}, ALONE)
