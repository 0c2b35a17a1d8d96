"""Leaps in the entries of Σ: the maximum over the cone, the factor of a singular matrix, and fits that end there."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import (
    BlockDiagonal,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.optim import Geometry
from openreml_nn.optim.cone import best, changes, to_the_best, triangular

LOWER = {s: np.array([(i, a) for i in range(s) for a in range(i + 1)]).T for s in (1, 2, 3, 4)}
V = BlockDiagonal(first=UnstructuredMatrix(3), residual=ScalarMatrix(3), second=UnstructuredMatrix(2))
CELLS = Geometry.of(V).cells
NONE = np.zeros(V.num_params, dtype=int)


def two_factors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A 3 × 3 and a 2 × 2 factor with rows of length 1 along a diagonal, and the places of their entries."""
    i, a = np.hstack([LOWER[3], LOWER[2] + 3])
    L = np.zeros((5, 5))
    L[i, a] = rng.standard_normal(9)
    L *= np.where(L.diagonal() < 0, -1.0, 1.0)
    return L / np.linalg.norm(L, axis=1)[:, None], i, a


@pytest.mark.parametrize("seed", range(8))
def test_best_is_the_maximum_over_the_cone(seed: int) -> None:
    """Necessary and sufficient for a concave model: S = ∂/∂Σ is negative semidefinite, S Σ is zero, as is the rest."""
    rng = np.random.default_rng(seed)
    L, i, a = two_factors(rng)
    if seed % 2:
        L[4, 4] = 1e-13  # from a singular matrix inwards, where ℓ rises that way
    A = rng.standard_normal((11, 11))
    H, g = A @ A.T + 0.1 * np.eye(11), 8.0 * rng.standard_normal(11)
    F, rest, value = best(g, H, L, i, a)
    x = np.concatenate([(F @ F.T - L @ L.T)[i, a], rest])
    assert value == pytest.approx(g @ x - 0.5 * x @ H @ x, rel=1e-12)
    assert value > 0
    slope, S = g - H @ x, np.zeros((5, 5))
    S[i, a] = 0.5 * slope[:9]
    S = S + S.T
    size = np.abs(g).max()
    np.testing.assert_allclose(slope[9:], 0.0, atol=1e-4 * size)
    np.testing.assert_allclose(S @ F, 0.0, atol=1e-4 * size)
    assert np.linalg.eigvalsh(S).max() < 1e-4 * size
    assert not F[3:, :3].any()
    assert not F[:3, 3:].any()


def test_best_is_newtons_step_where_that_stays_inside() -> None:
    L, i, a = np.eye(3), *LOWER[3]
    g, H = np.array([0.2, 0.1, -0.3, 0.1, 0.0, 0.2]), np.eye(6)
    F, rest, value = best(g, H, L, i, a)
    np.testing.assert_allclose((F @ F.T - np.eye(3))[i, a], g, atol=1e-5)
    assert value == pytest.approx(0.5 * g @ g, rel=1e-8)
    assert rest.shape == (0,)


def test_changes_are_derivatives() -> None:
    i, a = LOWER[3]
    F = torch.randn(3, 3, dtype=torch.float64)
    J = torch.func.jacrev(lambda F: F @ F.mT)(F)[i, a][:, i, a]
    np.testing.assert_allclose(changes(i, a, i, a, F.numpy()), J, atol=1e-14)


@pytest.mark.parametrize("zero", [(), (3,), (1,), (0, 2), (1, 2, 3)])
def test_triangular_factor_of_a_singular_matrix(zero: tuple[int, ...]) -> None:
    """A row that depends on those before it has no pivot, and the column is empty."""
    rng = np.random.default_rng(len(zero))
    L = np.tril(rng.standard_normal((4, 4))) + 2.0 * np.eye(4)
    L[:, zero] = 0.0
    F = L @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    found = triangular(F)
    np.testing.assert_allclose(found, L * np.where(L.diagonal() < 0, -1.0, 1.0), atol=1e-13)
    assert not found[:, zero].any()
    assert not np.triu(found, 1).any()


def test_a_leap_reaches_the_maximum_of_a_quadratic_in_the_covariances() -> None:
    """ℓ = −½ Σ (Σ_f − M_f)² with M_1 outside the cone: its projection is what the eigenvalues above zero leave."""
    M = [
        torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.8], [0.2, 0.8, 1.0]], dtype=torch.float64),
        1.2 * torch.eye(2).double(),
    ]
    assert torch.linalg.eigvalsh(M[0])[0] < 0
    theta = torch.tensor([0.0, 0.3, -0.1, 0.1, 0.2, -0.2, 0.5, 0.1, 0.0, 0.1], dtype=torch.float64)

    def values(theta: Tensor) -> Tensor:
        first, second = V.operand("first"), V.operand("second")
        return torch.cat([first.build(theta[:6]).flatten(), theta[6:7], second.build(theta[7:]).flatten()])

    J = torch.func.jacrev(values)(theta)
    aim = torch.cat([M[0].flatten(), torch.tensor([2.0], dtype=torch.float64), M[1].flatten()])
    score, information = J.mT @ (aim - values(theta)), J.mT @ J
    units = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    arguments = CELLS, theta.numpy(), score.numpy(), information.numpy(), NONE, units
    (leap,) = to_the_best(*arguments, 0.0)
    assert leap.alone
    there = values(theta + torch.from_numpy(leap.step * units))
    d, U = torch.linalg.eigh(M[0])
    aim[:9] = (U * d.clamp(min=0.0) @ U.mT).flatten()
    torch.testing.assert_close(there, aim, rtol=0.0, atol=1e-5)
    assert not to_the_best(*arguments, leap.promised)
    fixed = NONE.copy()
    fixed[6] = 1
    (leap,) = to_the_best(*arguments[:4], fixed, units, 0.0)
    assert leap.step[6] == 0.0


def test_no_leap_without_a_factor() -> None:
    k = 3
    alone = np.array([[-1, 4, -1], [-1, 0, -1], [-1, 0, -1]])
    for cells in (np.full((3, k), -1), alone):
        assert not to_the_best(cells, np.zeros(k), np.ones(k), np.eye(k), np.zeros(k), np.ones(k), 0.0)


def growth(seed: int, size: int, subjects: int, deviations: list[float]) -> tuple[Matrix, Tensor, Tensor]:
    """Polynomials of own coefficients in subjects of 4 to 12 rows."""
    rng = np.random.default_rng(seed)
    code = np.repeat(np.arange(subjects), rng.integers(4, 13, subjects))
    T = rng.uniform(0.0, 1.0, len(code))[:, None] ** np.arange(size)
    b = rng.standard_normal((subjects, size)) * deviations
    y = (T * b[code]).sum(1) + rng.standard_normal(len(code))
    X = torch.from_numpy(T)
    Z = KhatriRaoMatrix(X, DummyMatrix(torch.from_numpy(code)))
    G = KroneckerProduct(UnstructuredMatrix(size), IdentityMatrix(subjects))
    return Sum(subject=CovariancePropagation(Z, G), residual=ScalarMatrix(len(code))), torch.from_numpy(y), X


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_small_covariances_take_few_steps_from_anywhere(seed: int) -> None:
    V, y, X = growth(seed, 4, 200, [1.0, 0.15, 0.15, 0.15])
    result = fit(V, y, X)
    assert result.converged
    assert -1 in result.held
    assert sum(step.trials for step in result.history) <= 30
    again = fit(V, y, X, start=0.5 * torch.randn(V.num_params, dtype=torch.float64))
    assert again.converged
    assert again.loglik == pytest.approx(result.loglik, abs=1e-7)
    np.testing.assert_allclose(again.variance["estimate"], result.variance["estimate"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [9, 14, 17])
def test_a_covariance_of_nothing_is_an_end(seed: int) -> None:
    """Pure noise: both variances go to zero, and with them all that the information says of the factor."""
    rng = np.random.default_rng(seed)
    time, code = np.tile(np.arange(8.0) - 3.5, 15), np.repeat(np.arange(15), 8)
    X = torch.from_numpy(np.column_stack([np.ones(120), time]))
    Z = KhatriRaoMatrix(X, DummyMatrix(torch.from_numpy(code)))
    G = KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(15))
    V = Sum(subject=CovariancePropagation(Z, G), residual=ScalarMatrix(120))
    result = fit(V, torch.from_numpy(0.5 * rng.normal(size=120)), X)
    assert result.converged
    assert result.n_iter <= 20
    assert (result.variance["estimate"][:3].abs() < 1e-10).all()
