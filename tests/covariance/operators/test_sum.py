"""Sum: its formula and its shapes."""

import pytest
import torch

from openreml_nn.covariance import EqualEntryMatrix, IdentityMatrix, ScalarMatrix, Sum


def test_formula() -> None:
    V = Sum(EqualEntryMatrix(2, start=3.0), ScalarMatrix(2, start=2.0))
    torch.testing.assert_close(V(), torch.tensor([[5.0, 3.0], [3.0, 5.0]], dtype=torch.float64))


def test_diagonal_only_if_all_are() -> None:
    assert Sum(ScalarMatrix(2), IdentityMatrix(2)).is_diagonal
    assert not Sum(ScalarMatrix(2), EqualEntryMatrix(2)).is_diagonal


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"`Sum` needs operands of one shape, got \[\(2, 2\), \(3, 3\)\]"):
        Sum(ScalarMatrix(2), ScalarMatrix(3))
