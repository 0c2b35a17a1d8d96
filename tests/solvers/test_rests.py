"""The system of the rest, for independent and for correlated effects, against plain matrices."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.layouts import DenseLayout
from openreml_nn.solvers.rests import CorrelatedRest, IndependentRest, Rest

generator = torch.Generator().manual_seed(5)
Q = 6
w = torch.randn(Q, 9, generator=generator, dtype=torch.float64)
SCHUR, ROOT = w @ w.mT, torch.randn(4, 2, generator=generator, dtype=torch.float64)
KERNEL, VARIANCES = ROOT @ ROOT.mT, torch.tensor([0.5, 0.0], dtype=torch.float64)


def correlated(*G: Tensor) -> Rest:
    return CorrelatedRest(DenseLayout(Q), SCHUR.reshape(-1).clone(), [*G])


def independent(G: Tensor) -> Rest:
    return IndependentRest(DenseLayout(Q), SCHUR.reshape(-1).clone(), G)


def test_against_plain_matrices() -> None:
    """A singular kernel beside a variance of zero, and independent effects with zeros."""
    diagonal = torch.tensor([0.5, 0.0, 2.0, 1e-9, 3.0, 1.0], dtype=torch.float64)
    cases = [
        (correlated(KERNEL, VARIANCES), torch.block_diag(KERNEL, torch.diag(VARIANCES))),
        (independent(diagonal), torch.diag(diagonal)),
    ]
    for rest, G in cases:
        M = torch.eye(Q, dtype=torch.float64) + SCHUR @ G
        rhs = torch.randn(Q, 2, generator=generator, dtype=torch.float64)
        N, Phi = rest.solve(rhs)
        torch.testing.assert_close(rest.logdet, torch.logdet(M))
        torch.testing.assert_close(N, torch.linalg.solve(M, rhs))
        torch.testing.assert_close(Phi, G @ torch.linalg.solve(M, rhs))
        torch.testing.assert_close(rest.dense_Phi, G @ torch.linalg.inv(M))
        blocks = torch.linalg.solve(M, SCHUR)
        torch.testing.assert_close(rest.blocks, blocks if rest.blocks.ndim == 2 else blocks.diagonal())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_negative_eigenvalues_are_refused(size: int) -> None:
    """An even number of them leaves the determinant of I + S̃Ĝ above zero."""
    G = torch.eye(4, dtype=torch.float64) + 0.2
    G[:size, :size] *= -3.0
    with pytest.raises(torch.linalg.LinAlgError):
        correlated(G, VARIANCES)
    with pytest.raises(torch.linalg.LinAlgError):
        correlated(KERNEL, VARIANCES - 0.1)
    with pytest.raises(torch.linalg.LinAlgError):
        independent(torch.tensor([-1.0] * size + [1.0] * (Q - size), dtype=torch.float64))
