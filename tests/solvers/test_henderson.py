"""What the equations say where they have no solution, and products where X has gradients, by layout."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.covariance.transform import Transform, TransformScaleShift
from openreml_nn.solvers import NotPositiveDefinite, choose_solver, orders
from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.layouts import DenseLayout
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

N = 240
generator = torch.Generator().manual_seed(9)
plot = np.arange(N)
X = torch.cat([torch.ones(N, 1), torch.randn(N, 2, generator=generator)], dim=1).double()
y = torch.randn(N, generator=generator).double()
NONE = X[:, :0]


class Signed(TransformScaleShift):
    """f(x) = x, said to be above zero, so that the equations take it."""

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, float("inf")


def simple(codes: np.ndarray, trans: Transform | None = None) -> CovariancePropagation:
    Z = DummyMatrix(codes)
    return CovariancePropagation(Z, ScalarMatrix(Z.num_levels, trans))


def several(s: int) -> CovariancePropagation:
    Z = DummyMatrix(plot // 4)
    G = KroneckerProduct(DiagonalMatrix(s, [Signed()] * s), IdentityMatrix(Z.num_levels))
    return CovariancePropagation(KhatriRaoMatrix(X[:, :s], Z), G)


KERNEL = KnownMatrix(torch.eye(4).double() + 0.2, Signed())
CASES: dict[str, tuple[dict[str, Matrix], str]] = {
    "one effect": ({"bad": simple(plot // 4, Signed()), "good": simple(plot % 7)}, "bad"),
    "two effects": ({"bad": several(2), "good": simple(plot % 7)}, "bad"),
    "three effects": ({"bad": several(3), "good": simple(plot % 7)}, "bad"),
    "in the rest": ({"good": simple(plot // 4), "bad": simple(plot % 7, Signed())}, "bad"),
    "a kernel": ({"good": simple(plot // 4), "bad": CovariancePropagation(DummyMatrix(plot % 4), KERNEL)}, "bad"),
}


@pytest.mark.parametrize("design", [X, NONE])
@pytest.mark.parametrize("name", CASES)
def test_an_indefinite_covariance_is_refused(name: str, design: Tensor) -> None:
    """Whichever term it is in, with any number of effects, with fixed effects and without."""
    terms, bad = CASES[name]
    V = Sum(terms | {"residual": ScalarMatrix(N)})
    theta = V.theta.detach().clone()
    theta[V.operand_index(bad)] = -2.0
    message = rf"no solution at .*{bad}/.*sigma\^2\S* = -2.*: a covariance of the effects of '{bad}' is indefinite"
    with pytest.raises(NotPositiveDefinite, match=message):
        MixedModelEquationsSolver().prepare(V, y, design).evaluate(theta)


@pytest.mark.parametrize("order", [1, -1])
def test_variances_that_may_be_negative_are_for_other_solvers(order: int) -> None:
    codes = [plot // 4, plot % 7][::order]
    V = Sum(a=simple(codes[0], TransformScaleShift()), b=simple(codes[1]), residual=ScalarMatrix(N))
    with pytest.raises(ValueError, match=r"needs variances .* that of 'a/op_1/sigma\^2' does not"):
        MixedModelEquationsSolver().prepare(V, y)
    assert choose_solver(V).solver.name == "dense"


def test_a_residual_of_zero() -> None:
    V = Sum(a=simple(plot // 4), residual=ScalarMatrix(N, TransformScaleShift()))
    for value in (0.0, -1.0):
        with pytest.raises(NotPositiveDefinite, match=r"residual/sigma\^2 = .*the residual variance is not above zero"):
            MixedModelEquationsSolver().prepare(V, y, NONE).evaluate(torch.tensor([0.0, value]).double())


@pytest.mark.parametrize("layout", [DenseLayout, BandLayout, ChainLayout])
def test_products_where_the_design_has_gradients(layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout is not DenseLayout:
        monkeypatch.setattr(orders, "CALL", 0)
        monkeypatch.setattr(orders, "NARROWEST", 4)
        monkeypatch.setattr(orders, "WIDEST", 128 if layout is BandLayout else 0)
    V = Sum(gen=simple(plot // 2), block=simple((plot // 2 + 7 * (plot % 2)) % 80), residual=ScalarMatrix(N))
    rhs = torch.randn(N, 2, generator=generator).double()
    expected = MixedModelEquationsSolver().prepare(V, y, X).evaluate()
    problem = MixedModelEquationsSolver().prepare(V, y, X.clone().requires_grad_())
    assert isinstance(problem.products.layout, layout)
    evaluation = problem.evaluate()
    torch.testing.assert_close(evaluation.project(rhs.clone().requires_grad_()), expected.project(rhs))
    torch.testing.assert_close(evaluation.solve(rhs), expected.solve(rhs))
    torch.testing.assert_close(evaluation.inner_diagonal(rhs), expected.inner_diagonal(rhs))
