"""Blocks by level against plain matrices, and covariances that are none."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.small_blocks import eliminate, is_indefinite

generator = torch.Generator().manual_seed(2)
L = 5


def gram(s: int, rank: int, count: int) -> Tensor:
    """Positive semi-definite blocks, shape (s, s, count)."""
    W = torch.randn(count, s, rank, generator=generator, dtype=torch.float64)
    return (W @ W.mT).permute(1, 2, 0)


@pytest.mark.parametrize("levels", [1, L])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_eliminate(s: int, rank: int, levels: int) -> None:
    """Singular covariances and zero ones too."""
    A, S = gram(s, 2, L), gram(s, rank, levels)
    K, N, logdet = eliminate(A, S)
    by_level, covariance = A.permute(2, 0, 1), S.permute(2, 0, 1)
    M = torch.eye(s, dtype=torch.float64) + by_level @ covariance
    torch.testing.assert_close(N.permute(2, 0, 1), torch.linalg.inv(M))
    torch.testing.assert_close(K.permute(2, 0, 1), covariance @ torch.linalg.inv(M))
    torch.testing.assert_close(logdet, torch.logdet(M).sum())


@pytest.mark.parametrize("signs", [[-1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
def test_an_indefinite_covariance_has_no_numbers(signs: list[float]) -> None:
    """Where I + AS has an even number of negative eigenvalues too."""
    s = len(signs)
    S = torch.diag(torch.tensor(signs, dtype=torch.float64))[..., None]
    A = gram(s, s, L) + 5.0 * torch.eye(s, dtype=torch.float64)[..., None]
    try:
        found = eliminate(A, S)
    except torch.linalg.LinAlgError:
        return
    assert all(bool(part.isnan().all()) for part in found)


def test_is_indefinite() -> None:
    w = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    for G in (w @ w.mT, 1e-90 * w @ w.mT, torch.zeros(3, 3).double(), torch.zeros(3).double(), torch.ones(2).double()):
        assert not bool(is_indefinite(G))
    for G in (w @ w.mT - 0.01 * torch.eye(6).double(), -w @ w.mT, torch.tensor([1.0, -1e-3]).double()):
        assert bool(is_indefinite(G))
