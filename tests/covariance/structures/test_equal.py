"""One covariance for all pairs: formulas and the lower bound of a correlation."""

import pytest
import torch

from openreml_nn.covariance import CompoundSymmetricMatrix, EqualEntryMatrix, EquicorrelationMatrix


def test_formulas() -> None:
    I, J = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(EqualEntryMatrix(3, start=2.0)(), 2.0 * J)
    torch.testing.assert_close(EquicorrelationMatrix(3, start=-0.4)(), 1.4 * I - 0.4 * J)
    torch.testing.assert_close(CompoundSymmetricMatrix(3, start=[2.0, 0.3])(), 2.0 * (0.7 * I + 0.3 * J))


def test_names() -> None:
    assert EqualEntryMatrix(2).param_names == ["sigma^2"]
    assert EquicorrelationMatrix(2).param_names == ["rho"]
    assert CompoundSymmetricMatrix(2).param_names == ["sigma^2", "rho"]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_correlation_reaches_its_lower_bound_and_stays_positive_definite(n: int) -> None:
    mat = EquicorrelationMatrix(n)
    low, high = mat.trans[0].image if mat.trans else (0.0, 0.0)
    assert (low, high) == pytest.approx((-1.0 / (n - 1), 1.0))
    V = mat(torch.tensor([-12.0], dtype=torch.float64))
    assert torch.linalg.eigvalsh(V)[0].item() > 0.0
    with pytest.raises(ValueError, match="< y < 1"):
        EquicorrelationMatrix(n, start=-1.0 / (n - 1))


def test_entries_may_be_written() -> None:
    """A caller may change the result in place; the structure is not touched."""
    V = CompoundSymmetricMatrix(2)().detach()
    V += 1.0
    assert CompoundSymmetricMatrix(2)().detach().sum().item() < V.sum().item()
