"""Identity, one variance, a variance for each level."""

import pytest
import torch

from openreml_nn.covariance import DiagonalMatrix, IdentityMatrix, Levels, ScalarMatrix
from openreml_nn.covariance.transform import TransformExp


def test_values() -> None:
    assert torch.equal(IdentityMatrix(2)(), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(ScalarMatrix(2, start=3.0)(), 3.0 * torch.eye(2, dtype=torch.float64))
    assert DiagonalMatrix(2, start=[2.0, 5.0])().diagonal().tolist() == pytest.approx([2.0, 5.0])


def test_names() -> None:
    assert IdentityMatrix(2).param_names == []
    assert ScalarMatrix(2).param_names == ["sigma^2"]
    assert DiagonalMatrix(2).param_names == ["sigma^2_0", "sigma^2_1"]
    assert DiagonalMatrix(Levels(["dry", "wet"])).param_names == ["sigma^2_dry", "sigma^2_wet"]


def test_transform_of_a_variance() -> None:
    assert ScalarMatrix(1, TransformExp())(torch.tensor([1.0])).item() == pytest.approx(2.7182817)


def test_they_say_that_they_are_diagonal() -> None:
    assert IdentityMatrix(2).is_diagonal
    assert ScalarMatrix(2).is_diagonal
    assert DiagonalMatrix(2).is_diagonal


def test_a_large_one_multiplies_without_its_dense_form() -> None:
    n = 1_000_000
    mat, rhs = ScalarMatrix(n, start=2.0), torch.ones(n, 1)
    assert mat.matmul(mat.theta.detach().float(), rhs).sum().item() == pytest.approx(2.0 * n)


def test_refused_start() -> None:
    for start in (0.0, -1.0):
        with pytest.raises(ValueError, match="y > 0"):
            ScalarMatrix(2, start=start)
