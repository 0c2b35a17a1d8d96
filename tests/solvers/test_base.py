"""What all solvers share: derivatives along the free parameters, and where an evaluation fails."""

import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    KnownMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers import DenseSolver
from openreml_nn.solvers.base import FEW_DIRECTIONS, along_free, where_it_fails

K = torch.eye(4) + 0.5
MODELS: dict[str, Matrix] = {
    "few": Sum(CovariancePropagation(DummyMatrix([0, 1, 2, 3, 0, 1]), KnownMatrix(K)), AR1Matrix(6), ScalarMatrix(6)),
    "many": UnstructuredMatrix(6),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fixed", [[], [1]])
def test_derivatives_along_the_free_parameters(name: str, fixed: list[int]) -> None:
    V, rhs = MODELS[name], torch.randn(6, 1, dtype=torch.float64)
    theta = torch.randn(V.num_params, dtype=torch.float64)
    V.set_no_grad(fixed)

    def product(theta: Tensor) -> Tensor:
        return V.matmul(theta, rhs)[:, 0]

    assert (len(V.free_index) > FEW_DIRECTIONS) == (name == "many")
    expected = torch.func.jacfwd(product)(theta)[:, V.free_index]
    with torch.no_grad():
        got = along_free(V, theta, product)
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad


def test_a_function_without_the_parameters() -> None:
    V, x = ScalarMatrix(3), torch.ones(2, dtype=torch.float64)
    for function in (lambda theta: x, lambda theta: x.clone().requires_grad_() * 2.0):
        assert along_free(V, V.theta, function).tolist() == [[0.0], [0.0]]


def test_no_free_parameter() -> None:
    V = ScalarMatrix(3)
    V.set_no_grad([0])
    assert along_free(V, V.theta, V.diagonal).shape == (3, 0)


def test_where_it_fails_is_on_the_natural_scale() -> None:
    V = Sum(a=AR1Matrix(6), residual=ScalarMatrix(6, start=4.0))
    problem = DenseSolver().prepare(V, torch.arange(6.0).double().square())
    theta = V.theta.detach().requires_grad_()
    assert where_it_fails(problem, theta) == "a/sigma^2 = 1, a/rho = 0, residual/sigma^2 = 4"
