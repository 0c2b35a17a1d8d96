"""What information leaves out along a triangular factor, against the second derivatives of a function of Σ = L L'."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import IdentityMatrix, KnownMatrix, KroneckerProduct, ScalarMatrix, Sum, UnstructuredMatrix
from openreml_nn.optim import Geometry
from openreml_nn.optim.triangular import boundary_in_words, left_out, turns_only

T, K = 3, 6
V = Sum(residual=ScalarMatrix(T), g=UnstructuredMatrix(T))
CELLS = Geometry.of(V).cells


def derivatives(S: Tensor, theta: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of ⟨S, Σ(θ)⟩ with respect to the six parameters of Σ and one before them."""
    Sigma = V.operand("g")

    def function(theta: Tensor) -> Tensor:
        return (S * Sigma.build(theta[1:])).sum()

    H = torch.autograd.functional.hessian(function, theta)
    return torch.func.grad(function)(theta).numpy(), H.numpy()


def held(*which: int) -> np.ndarray:
    return np.isin(np.arange(K + 1), which).astype(int) * -1


@pytest.mark.parametrize("last", [-0.3, -13.0, -200.0])
def test_it_is_the_second_derivative_of_the_factor(last: float) -> None:
    theta = torch.randn(K + 1, dtype=torch.float64)
    theta[-1] = last
    A = torch.randn(T, 2, dtype=torch.float64)
    score, H = derivatives(-A @ A.mT, theta)
    np.fill_diagonal(H, H.diagonal() - np.where(CELLS[1] == CELLS[2], score, 0.0))  # that of the logarithms
    np.testing.assert_allclose(left_out(CELLS, theta.numpy(), score, held(6)), -H, atol=1e-10)


def test_none_where_nothing_is_held_or_the_likelihood_rises() -> None:
    theta = torch.randn(K + 1, dtype=torch.float64)
    A = torch.randn(T, T, dtype=torch.float64)
    score, _ = derivatives(-A @ A.mT, theta)
    assert not left_out(CELLS, theta.numpy(), score, held(0, 2)).any()
    score, _ = derivatives(A @ A.mT, theta)
    np.testing.assert_allclose(left_out(CELLS, theta.numpy(), score, held(6)), 0.0, atol=1e-10)


def test_cells_of_a_factor_with_a_fixed_entry() -> None:
    assert CELLS.tolist() == [[-1, 1, 1, 1, 1, 1, 1], [-1, 0, 1, 1, 2, 2, 2], [-1, 0, 0, 1, 0, 1, 2]]
    partly = Sum(g=UnstructuredMatrix(2), h=UnstructuredMatrix(2))
    partly.set_no_grad([1])
    assert Geometry.of(partly).cells.tolist() == [[-1, -1, 3, 3, 3], [-1, -1, 0, 1, 1], [-1, -1, 0, 0, 1]]


def test_a_singular_covariance_between_traits_takes_few_steps() -> None:
    rng = np.random.default_rng(5)
    count, traits = 60, 3
    M = rng.standard_normal((count, 2 * count))
    kernel = M @ M.T / (2 * count)
    loadings = np.array([[1.0, 0.0, 0.0], [-0.6, 0.4, 0.0], [0.5, 0.8, 0.0]])  # of rank 2
    g = np.linalg.cholesky(kernel) @ rng.standard_normal((count, traits)) @ loadings.T
    y = torch.from_numpy((g + rng.standard_normal((count, traits))).T.ravel())
    X = torch.eye(traits, dtype=torch.float64).repeat_interleave(count, dim=0)
    K = KnownMatrix(torch.from_numpy(kernel), start=1.0)
    K.set_no_grad(0)
    V = Sum(g=KroneckerProduct(UnstructuredMatrix(traits), K),
            residual=KroneckerProduct(UnstructuredMatrix(traits), IdentityMatrix(count)))  # fmt: skip
    result = fit(V, y, X)
    assert result.converged
    assert result.reason == "the score is zero, on the boundary where the covariance of g is singular"
    assert sum(step.trials for step in result.history) <= 16
    dense = fit(V, y, X, solver="dense", start=torch.zeros(V.num_params, dtype=torch.float64))
    assert result.loglik == pytest.approx(dense.loglik, abs=1e-8)


def test_turns_only() -> None:
    """With L_22 next to nothing the second and third column turn into one another; another direction moves L L'."""
    cells = np.array([[0] * 6, [0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]])
    theta = np.array([0.1, 0.4, -12.0, 0.5, 0.8, -0.5])
    third = np.exp(theta[5])
    turn = np.array([[0.0, 0.0, 0.0, 0.0, third, -theta[4] / third]]).T
    assert turns_only(cells, theta, turn)
    assert not turns_only(cells, theta, np.eye(6)[:, 4:5])
    assert not turns_only(cells, theta, np.hstack([turn, np.eye(6)[:, :1]]))
    theta[2] = 0.2
    assert not turns_only(cells, theta, turn)
    assert not turns_only(np.full((3, 6), -1), theta, turn)
    assert not turns_only(cells, theta, turn[:, :0])


def test_a_boundary_in_words() -> None:
    names = ["a/rho", "g/L_1_1", "g/L_I(x / 2)_1", "g/L_I(x / 2)_I(x / 2)", "L_0_0"]
    cells = np.array([[-1, 1, 1, 1, 4], [-1, 0, 1, 1, 0], [-1, 0, 0, 1, 0]])
    held = np.array([True, False, False, True, False])
    assert boundary_in_words(names, cells, held) == "of a/rho and where the covariance of g is singular"
    assert boundary_in_words(names, cells, np.arange(5) == 0) == "of a/rho"
    assert boundary_in_words(names, cells, np.arange(5) == 4) == "where V is singular"
