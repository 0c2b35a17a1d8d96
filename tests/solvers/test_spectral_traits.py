"""Several traits of related individuals against the dense solver, on a table of structures; refusals and references."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from openreml_nn import ML, REML, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    FactorAnalyticMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.solvers.reductions import reduce_kernel
from openreml_nn.solvers.spectral_traits import SpectralTraitsProblem, SpectralTraitsSolver

INDIVIDUALS, TRAITS = 14, 3
N = INDIVIDUALS * TRAITS
generator = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def kernel(n: int, rank: int) -> KnownMatrix:
    W = normal(n, rank)
    held = KnownMatrix(W @ W.mT / rank, start=1.0)
    held.set_no_grad(0)
    return held


ORDER = torch.randperm(N, generator=generator)
ANIMAL = torch.arange(INDIVIDUALS).repeat_interleave(TRAITS)[ORDER]
TRAIT = torch.arange(TRAITS).repeat(INDIVIDUALS)[ORDER]
INDICATORS = one_hot(TRAIT, TRAITS).to(torch.float64)
X, y = torch.cat([INDICATORS, normal(N, 1)], dim=1), normal(N) + TRAIT
A, WIDER = kernel(INDIVIDUALS, 20), kernel(INDIVIDUALS + 4, 25)
NAMES = ["r", "s", "t"]


def cells(levels: int = INDIVIDUALS) -> CellMatrix:
    return CellMatrix(TRAIT, DummyMatrix(ANIMAL, levels=range(levels)), NAMES)


def genetic(Sigma: Matrix, K: Matrix = A) -> CovariancePropagation:
    return CovariancePropagation(cells(K.shape[0]), KroneckerProduct(Sigma, K))


def residual(Sigma: Matrix) -> CovariancePropagation:
    return CovariancePropagation(cells(), KroneckerProduct(Sigma, IdentityMatrix(INDIVIDUALS)))


US, DIAGONAL = lambda: UnstructuredMatrix(TRAITS), lambda: DiagonalMatrix(TRAITS)
MODELS = {
    "unstructured": Sum(g=genetic(US()), residual=residual(US())),
    "factor-analytic": Sum(g=genetic(FactorAnalyticMatrix(TRAITS, k=1)), residual=residual(DIAGONAL())),
    "serial": Sum(g=genetic(AR1Matrix(TRAITS)), residual=residual(US())),
    "labels without records": Sum(g=genetic(US(), WIDER), residual=residual(US())),
    "singular kernel": Sum(g=genetic(US(), kernel(INDIVIDUALS, 5)), residual=residual(US())),
    "independent individuals": Sum(g=genetic(US(), IdentityMatrix(INDIVIDUALS)), residual=residual(DIAGONAL())),
    "one residual variance": Sum(g=genetic(US()), residual=ScalarMatrix(N)),
    "a residual variance for each trait": Sum(g=genetic(US()), residual=DiagonalPropagation(INDICATORS, DIAGONAL())),
    "indicators": Sum(
        g=CovariancePropagation(KhatriRaoMatrix(INDICATORS, DummyMatrix(ANIMAL)), KroneckerProduct(US(), A)),
        residual=residual(US()),
    ),
    "rows in order, traits slower": Sum(
        g=KroneckerProduct(US(), A), residual=KroneckerProduct(US(), IdentityMatrix(INDIVIDUALS))
    ),
    "rows in order, traits faster": Sum(
        g=KroneckerProduct(A, US()), residual=KroneckerProduct(IdentityMatrix(INDIVIDUALS), US())
    ),
    "three factors": Sum(
        g=CovariancePropagation(cells(), KroneckerProduct(ScalarMatrix(1), AR1Matrix(TRAITS), A)),
        residual=residual(US()),
    ),
    "a free scale of the kernel": Sum(
        g=genetic(FactorAnalyticMatrix(TRAITS, k=1), KnownMatrix(A.K)), residual=residual(US())
    ),
}


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense(name: str, objective: type[REML] | type[ML], same_as_dense: Callable[..., None]) -> None:
    V = MODELS[name]
    for theta in (V.theta.detach(), 0.4 * torch.randn(V.num_params, dtype=torch.float64)):
        same_as_dense(V, theta, y, X, SpectralTraitsSolver(), objective=objective)


def test_variance_of_zero(same_as_dense: Callable[..., None]) -> None:
    V = MODELS["factor-analytic"]
    theta = 0.3 * torch.randn(V.num_params, dtype=torch.float64)
    theta[V.param_names.index("residual/op_1/op_0/sigma^2_0")] = -400.0
    same_as_dense(V, theta, y, X, SpectralTraitsSolver(), tolerance=1e-7)
    singular = MODELS["singular kernel"]
    theta = torch.zeros(singular.num_params, dtype=torch.float64)
    theta[-1] = -400.0
    with pytest.raises(NotPositiveDefinite, match="eigenvalue"):
        SpectralTraitsSolver().prepare(singular, y, X).evaluate(theta)


@pytest.mark.parametrize("name", ["unstructured", "labels without records", "a residual variance for each trait"])
def test_gradcheck(name: str) -> None:
    V = MODELS[name]
    problem = SpectralTraitsSolver().prepare(V, y, X)

    def terms(theta: Tensor) -> tuple[Tensor, ...]:
        evaluation = problem.evaluate(theta)
        return evaluation.logdet_V, evaluation.logdet_XtViX, evaluation.yPy

    assert torch.autograd.gradcheck(terms, (V.theta.detach() + 0.1).requires_grad_())


def test_gradient_of_the_data() -> None:
    found = []
    for solver in (SpectralTraitsSolver(), "dense"):
        data = [y.clone().requires_grad_(), X.clone().requires_grad_()]
        REML(MODELS["unstructured"], solver)(*data).backward()
        found.append([value.grad for value in data])
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def test_problem_is_copied() -> None:
    V = MODELS["unstructured"]
    problem = SpectralTraitsSolver().prepare(V, y, X)
    copy = pickle.loads(pickle.dumps(problem))
    theta = V.theta.detach() + 0.1
    torch.testing.assert_close(copy.evaluate(theta).yPy, problem.evaluate(theta).yPy, rtol=1e-14, atol=0.0)


def test_second_derivative_is_refused() -> None:
    V = MODELS["unstructured"]
    theta = V.theta.detach().requires_grad_()
    loglik = REML(V, SpectralTraitsSolver())(y, X, theta)
    with pytest.raises(NotImplementedError, match="dense"):
        torch.autograd.grad(loglik, theta, create_graph=True)


def test_fit_is_the_same() -> None:
    V = MODELS["one residual variance"]
    start = V.theta.detach().clone()
    ours, dense = (fit(V, y, X, solver=s, start=start) for s in (SpectralTraitsSolver(), "dense"))
    assert ours.loglik == pytest.approx(dense.loglik, rel=1e-10)
    assert ours.n_iter == dense.n_iter


def test_reduction_serves_again(same_as_dense: Callable[..., None]) -> None:
    V = MODELS["labels without records"]
    counts = (torch.arange(WIDER.shape[0]) < INDIVIDUALS).to(torch.float64)
    solver = SpectralTraitsSolver(reduce_kernel(WIDER.K.clone(), counts, eigenvectors=True))
    theta = V.theta.detach() + 0.1
    same_as_dense(V, theta, y, X, solver)
    problem = SpectralTraitsSolver().prepare(V, y, X)
    assert isinstance(problem, SpectralTraitsProblem)
    assert SpectralTraitsSolver(problem.reduction).refusal(V) is None
    with pytest.raises(ValueError, match="another kernel"):
        solver.prepare(MODELS["unstructured"], y, X)
    with pytest.raises(ValueError, match="eigenvectors=True"):
        SpectralTraitsSolver(reduce_kernel(WIDER.K))


def drop(rows: int) -> Sum:
    animal, trait = ANIMAL[:-rows], TRAIT[:-rows]
    Z = CellMatrix(trait, DummyMatrix(animal, levels=range(INDIVIDUALS)), NAMES)
    own = KroneckerProduct(US(), IdentityMatrix(INDIVIDUALS))
    return Sum(g=CovariancePropagation(Z, KroneckerProduct(US(), A)), residual=CovariancePropagation(Z, own))


OTHER_TRAITS = CellMatrix((TRAIT + 1) % TRAITS, DummyMatrix(ANIMAL), NAMES)
OTHER_ANIMALS = CellMatrix(TRAIT, DummyMatrix(ANIMAL[torch.randperm(N, generator=generator)]), NAMES)
ERROR = KroneckerProduct(US(), IdentityMatrix(INDIVIDUALS))


@pytest.mark.parametrize(
    ("V", "reason"),
    [
        (ScalarMatrix(N), "two operands.*V: a ScalarMatrix is no `KroneckerProduct`"),
        (Sum(g=genetic(US()), h=genetic(US()), residual=residual(US())), "two operands"),
        (Sum(g=genetic(US()), residual=genetic(US())), "both have a known matrix"),
        (Sum(g=genetic(US()), residual=DiagonalMatrix(N)), "residual: a DiagonalMatrix is none"),
        (Sum(g=genetic(US()), residual=DiagonalPropagation(INDICATORS[:, [1, 0, 2]], DIAGONAL())), "another order"),
        (Sum(g=genetic(US()), residual=CovariancePropagation(OTHER_TRAITS, ERROR)), "same traits"),
        (Sum(g=genetic(US()), residual=CovariancePropagation(OTHER_ANIMALS, ERROR)), "same individuals"),
        (Sum(g=genetic(US(), AR1Matrix(INDIVIDUALS)), residual=ScalarMatrix(N)), "must be a known matrix"),
        (Sum(g=CovariancePropagation(KhatriRaoMatrix(X[:, 1:], DummyMatrix(ANIMAL)), KroneckerProduct(US(), A)),
             residual=ScalarMatrix(N)), "one effect of one level"),
    ],
)  # fmt: skip
def test_refusal(V: Sum, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpectralTraitsSolver().prepare(V, y, X)


def test_missing_records_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 3 traits once, got 40 rows of 14 individuals"):
        SpectralTraitsSolver().prepare(drop(2), y[:-2], X[:-2])


def test_cost_is_told() -> None:
    assert "n = 14 individuals" in SpectralTraitsSolver().cost(MODELS["unstructured"])
    assert "two operands" in SpectralTraitsSolver().cost(ScalarMatrix(N))
