"""The mixed-model equations where the rest is sparse, as in field trials: every quantity against the dense solver."""

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import ML, REML
from openreml_nn.covariance import (
    CellMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.transform import Transform, TransformScaleShift
from openreml_nn.likelihood import average_information
from openreml_nn.objectives import Objective
from openreml_nn.solvers import NotPositiveDefinite, choose_solver, orders
from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.borders import BorderedLayout
from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

N = 420
generator = torch.Generator().manual_seed(8)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


plot = np.arange(N)
GEN, BLOCK = plot // 2, (plot // 2 + 7 * (plot % 2)) % 140  # two plots of a genotype, in blocks 7 apart, around a ring
TRIAL = plot // 42
WITHIN = 14 * TRIAL + (plot % 42 // 3 + (plot % 3) * (plot % 42 // 14)) % 14  # trials that have nothing in common
GENOTYPE, REP = plot % 14, plot % 42 // 14  # the same 14 genotypes in all trials
SCHOOL = plot // 28
PLACE = 9 * TRIAL + 3 * REP + (GENOTYPE + 5 * REP) % 14 // 5
X = torch.cat([torch.ones(N, 1, dtype=torch.float64), normal(N, 2)], dim=1)
x, y = X[:, 1:2], normal(N) + 2.0


def simple(factor: np.ndarray, trans: Transform | None = None) -> CovariancePropagation:
    Z = DummyMatrix(factor)
    return CovariancePropagation(Z, ScalarMatrix(Z.num_levels, trans))


def slopes(factor: np.ndarray) -> CovariancePropagation:
    Z = DummyMatrix(factor)
    G = KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(Z.num_levels))
    return CovariancePropagation(KhatriRaoMatrix(torch.cat([torch.ones_like(x), x], dim=1), Z), G)


def cells(factor: np.ndarray, within: np.ndarray) -> CovariancePropagation:
    """Independent effects of a level in each of some columns, with a variance for each column."""
    Z, labels = DummyMatrix(factor), [str(label) for label in np.unique(within)]
    G = KroneckerProduct(DiagonalMatrix(len(labels)), IdentityMatrix(Z.num_levels))
    return CovariancePropagation(CellMatrix(within, Z, labels), G)


SOME = DummyMatrix(GEN.astype(str), levels=[str(g) for g in range(5, 210)], unknown="zero")
RESIDUAL: dict[str, Matrix] = {"residual": ScalarMatrix(N)}
WEIGHTS: dict[str, Matrix] = {"residual": DiagonalPropagation(1.0 + x.abs(), ScalarMatrix(1))}
CASES: dict[str, dict[str, Matrix]] = {
    "a ring of blocks": {"gen": simple(GEN), "block": simple(BLOCK)} | RESIDUAL,
    "trials apart": {"gen": simple(WITHIN + 140 * (plot % 2)), "block": simple(WITHIN)} | RESIDUAL,
    "classes in schools": {"pupil": simple(plot // 2), "class": simple(plot // 3), "school": simple(SCHOOL)} | RESIDUAL,
    "weights": {"gen": simple(GEN), "block": simple(BLOCK)} | WEIGHTS,
    "slopes": {"block": simple(BLOCK), "gen": slopes(GEN)} | RESIDUAL,
    "two variances": {"gen": simple(GEN), "block": cells(BLOCK, plot % 2)} | RESIDUAL,
    "genotypes in all trials": {
        "gen:trial": simple(14 * TRIAL + GENOTYPE),
        "gen": simple(GENOTYPE),
        "trial": simple(TRIAL),
        "block": simple(PLACE),
    }
    | RESIDUAL,
    "rows of no genotype": {"gen": CovariancePropagation(SOME, ScalarMatrix(205)), "block": simple(BLOCK)} | RESIDUAL,
}


@pytest.fixture(autouse=True, params=["band", "chain"])
def _short_chains(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Bands, or chains of blocks, where a dense matrix would be as fast."""
    if request.param == "chain":
        monkeypatch.setattr(orders, "WIDEST", 0)
    monkeypatch.setattr(orders, "CALL", 0)
    monkeypatch.setattr(orders, "NARROWEST", 4)


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name: str, objective: type[Objective], same_as_dense: Callable[..., None]) -> None:
    V = Sum(CASES[name])
    layout = MixedModelEquationsSolver().prepare(V, y, X).products.layout
    assert isinstance(layout, (BandLayout, BorderedLayout, ChainLayout))
    if name in ("a ring of blocks", "genotypes in all trials"):
        assert isinstance(layout, BorderedLayout) == (name == "genotypes in all trials")
    theta = 0.5 * torch.randn(V.num_params, dtype=torch.float64)
    same_as_dense(V, theta, y, X, "mixed_model_equations", objective, tolerance=1e-10)


@pytest.mark.parametrize("name", ["a ring of blocks", "classes in schools", "two variances", "genotypes in all trials"])
@pytest.mark.parametrize("small", [-20.0, -500.0])
def test_variances_of_zero(name: str, small: float, same_as_dense: Callable[..., None]) -> None:
    """One that is next to zero, and one that is zero to the last digit."""
    V = Sum(CASES[name])
    for k in range(V.num_params - 1):
        theta = torch.zeros(V.num_params, dtype=torch.float64)
        theta[k] = small
        same_as_dense(V, theta, y, X, "mixed_model_equations", tolerance=1e-10)
    theta[:-1] = small
    same_as_dense(V, theta, y, X, "mixed_model_equations", tolerance=1e-10)


class NotNegative(TransformScaleShift):
    """f(x) = x ≥ 0."""

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, math.inf


def test_variances_on_their_own_scale(same_as_dense: Callable[..., None]) -> None:
    """Slopes at a variance of zero, and a negative one is refused."""
    plain = NotNegative()
    V = Sum({"gen": simple(GEN, plain), "block": simple(BLOCK, plain)} | RESIDUAL)
    for values in ([0.0, 0.5, 0.1], [0.5, 0.0, 0.1], [0.0, 0.0, 0.1], [1e-9, 1e-9, 0.1]):
        theta = torch.tensor(values, dtype=torch.float64)
        same_as_dense(V, theta, y, X, "mixed_model_equations", tolerance=1e-11)
    with pytest.raises(NotPositiveDefinite):
        MixedModelEquationsSolver().prepare(V, y, X).evaluate(torch.tensor([0.5, -0.1, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("name", ["slopes", "genotypes in all trials"])
def test_on_another_device(name: str, another_device: Callable[[], AbstractContextManager[torch.device]]) -> None:
    def found(V: Matrix, y: Tensor, X: Tensor) -> list[Tensor]:
        evaluation = MixedModelEquationsSolver().prepare(V, y, X).evaluate()
        loglik = REML(V).loglik(evaluation)
        score = torch.cat(torch.autograd.grad(loglik, V.theta_parameters()))
        return [part.detach().cpu() for part in (loglik, score, average_information(evaluation), evaluation.Py)]

    V = Sum(CASES[name])
    here = found(V, y, X)
    with another_device() as device:
        there = found(copy.deepcopy(V).to(device), y.to(device), X.to(device))
        for one, other in zip(there, here, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_copies() -> None:
    V = Sum(CASES["genotypes in all trials"])
    problem = MixedModelEquationsSolver().prepare(V, y, X)
    expected = problem.evaluate().logdet_V
    for other in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(other.evaluate().logdet_V, expected)


def test_choice() -> None:
    """Many more effects than half the rows, beside those of the largest term: a chain where they meet few others."""
    pairs: dict[str, Matrix] = {"a": simple((plot + 1) // 2), "b": simple(plot // 2)}
    choice = choose_solver(Sum(pairs | {"c": simple(plot // 3)} | RESIDUAL))
    assert choice.solver.name == "mixed_model_equations"
    assert "8 T b³" in choice.cost or "7 q w²" in choice.cost
    assert "after 211 levels" in choice.cost
    shuffled = np.random.default_rng(0).permutation(N)
    crossed = Sum(pairs | {"c": simple(shuffled // 3)} | RESIDUAL)
    assert choose_solver(crossed).solver.name == "dense"
    assert "q³" in MixedModelEquationsSolver().cost(crossed)
