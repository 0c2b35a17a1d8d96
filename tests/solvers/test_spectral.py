"""One kernel plus noise against the dense solver, on a table of kernels and designs; reductions that are used again."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openreml_nn import ML, REML, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.solvers.reductions import BandReduction, SpectralDecomposition, reduce_factor, reduce_kernel
from openreml_nn.solvers.spectral import SpectralProblem, SpectralSolver
from openreml_nn.testing.kernels import random_kernel

N = 90
generator = torch.Generator().manual_seed(7)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def kernel(n: int, rank: int) -> Tensor:
    W = normal(n, rank)
    return W @ W.mT / rank


CENTRE = torch.eye(N, dtype=torch.float64) - 1.0 / N
K, SMALL = kernel(N, N + 20), kernel(30, 33)
LEVELS = torch.randint(0, 30, (N,), generator=generator)
ONCE = torch.randperm(N, generator=generator)
FEW, MANY, CONSTANT = normal(N, 40), normal(N, 120), normal(N, 3)
FEW[:, 7], FEW[:, 8] = FEW[:, 6], 0.0  # a marker twice, and one without variation
X, y = torch.cat([torch.ones(N, 1, dtype=torch.float64), normal(N, 2)], dim=1), K @ normal(N) + normal(N) + 3.0


def over(Z: DummyMatrix | KhatriRaoMatrix | Tensor, G: KnownMatrix | ScalarMatrix | KroneckerProduct) -> Sum:
    return Sum(g=CovariancePropagation(Z, G), residual=ScalarMatrix(N))


MODELS = {
    "kernel of the rows": Sum(g=KnownMatrix(K), residual=ScalarMatrix(N)),
    "labels in another order": over(DummyMatrix(ONCE), KnownMatrix(K)),
    "singular kernel": over(DummyMatrix(ONCE), KnownMatrix(CENTRE @ K @ CENTRE)),
    "kernel of low rank": over(DummyMatrix(ONCE), KnownMatrix(kernel(N, 5))),
    "families": over(DummyMatrix(ONCE), KnownMatrix(torch.block_diag(*[kernel(9, 20)] * 10))),
    "labels without records": over(DummyMatrix(ONCE, levels=range(N + 6)), KnownMatrix(kernel(N + 6, N))),
    "more records than labels": over(DummyMatrix(LEVELS, levels=range(30)), KnownMatrix(SMALL)),
    "records without label": over(DummyMatrix(LEVELS, levels=range(25), unknown="zero"), KnownMatrix(SMALL[:25, :25])),
    "slopes": over(KhatriRaoMatrix(normal(N, 1), DummyMatrix(LEVELS, levels=range(30))), KnownMatrix(SMALL)),
    "slope of one record a level": over(KhatriRaoMatrix(normal(N, 1), DummyMatrix(ONCE)), KnownMatrix(K)),
    "no level with records": over(
        DummyMatrix(["?"] * N, levels=range(25), unknown="zero"), KnownMatrix(SMALL[:25, :25])
    ),
    "independent levels": over(DummyMatrix(LEVELS, levels=range(30)), ScalarMatrix(30)),
    "scale in a product": over(DummyMatrix(ONCE), KroneckerProduct(ScalarMatrix(1), KnownMatrix(K))),
    "fewer markers than rows": over(FEW, ScalarMatrix(40)),
    "more markers than rows": over(MANY, ScalarMatrix(120)),
    "related columns": over(normal(N, 30), KnownMatrix(SMALL)),
}


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense(name: str, objective: type[REML] | type[ML], same_as_dense: Callable[..., None]) -> None:
    V = MODELS[name]
    for values in ([0.0] * V.num_params, [-0.8, *[0.3] * (V.num_params - 1)], [*[0.9] * (V.num_params - 1), -0.7]):
        theta = torch.tensor(values, dtype=torch.float64)
        same_as_dense(V, theta, y, X, SpectralSolver(), objective=objective)


@pytest.mark.parametrize("name", ["labels in another order", "more records than labels", "fewer markers than rows"])
@pytest.mark.parametrize("which", [0, 1])
def test_variance_next_to_zero(name: str, which: int, same_as_dense: Callable[..., None]) -> None:
    V = MODELS[name]
    theta = torch.tensor([0.3, 0.1], dtype=torch.float64)
    theta[which] = (-30.0, -5.0)[which]
    same_as_dense(V, theta, y, X, SpectralSolver(), tolerance=(1e-9, 1e-6)[which])


def test_variance_of_zero(same_as_dense: Callable[..., None]) -> None:
    V = MODELS["labels in another order"]
    for theta in ([-400.0, 0.2], [0.2, -400.0]):
        raw = torch.tensor(theta, dtype=torch.float64)
        same_as_dense(V, raw, y, X, SpectralSolver(), tolerance=1e-7)


def test_no_residual_variance() -> None:
    for name in ("singular kernel", "more records than labels", "fewer markers than rows"):
        with pytest.raises(NotPositiveDefinite, match="residual"):
            SpectralSolver().prepare(MODELS[name], y, X).evaluate(torch.tensor([0.0, -400.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["singular kernel", "more records than labels", "fewer markers than rows"])
def test_gradcheck(name: str) -> None:
    V = MODELS[name]
    problem = SpectralSolver().prepare(V, y, X)

    def terms(theta: Tensor) -> tuple[Tensor, ...]:
        evaluation = problem.evaluate(theta)
        return evaluation.logdet_V, evaluation.logdet_XtViX, evaluation.yPy

    assert torch.autograd.gradcheck(terms, torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", ["more records than labels", "fewer markers than rows"])
def test_gradient_of_the_data(name: str) -> None:
    found = []
    for solver in (SpectralSolver(), "dense"):
        data = [y.clone().requires_grad_(), X.clone().requires_grad_()]
        REML(MODELS[name], solver)(*data).backward()
        found.append([value.grad for value in data])
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def test_problem_is_copied() -> None:
    V = MODELS["more records than labels"]
    problem = SpectralSolver().prepare(V, y, X)
    copy = pickle.loads(pickle.dumps(problem))
    theta = V.theta.detach() + 0.1
    torch.testing.assert_close(copy.evaluate(theta).yPy, problem.evaluate(theta).yPy, rtol=1e-14, atol=0.0)


def test_second_derivative_is_refused() -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loglik = REML(MODELS["kernel of the rows"], SpectralSolver())(y, X, theta)
    with pytest.raises(NotImplementedError, match="dense"):
        torch.autograd.grad(loglik, theta, create_graph=True)


def test_fixed_parameters(same_as_dense: Callable[..., None]) -> None:
    V = Sum(g=CovariancePropagation(DummyMatrix(ONCE), KnownMatrix(K)), residual=IdentityMatrix(N))
    theta = torch.tensor([0.3], dtype=torch.float64)
    same_as_dense(V, theta, y, X, SpectralSolver())
    held = Sum(g=CovariancePropagation(DummyMatrix(ONCE), KnownMatrix(K)), residual=ScalarMatrix(N))
    held.set_no_grad(1)
    theta = torch.tensor([0.3, 0.1], dtype=torch.float64)
    same_as_dense(held, theta, y, X, SpectralSolver())


@pytest.mark.parametrize("name", ["singular kernel", "more records than labels", "fewer markers than rows"])
def test_fit_is_the_same(name: str) -> None:
    V = MODELS[name]
    zero = torch.zeros(2, dtype=torch.float64)
    ours, dense = (fit(V, y, X, solver=s, start=zero) for s in (SpectralSolver(), "dense"))
    assert ours.converged
    assert ours.loglik == pytest.approx(dense.loglik, rel=1e-12)
    torch.testing.assert_close(ours.theta, dense.theta, rtol=1e-6, atol=1e-6)


# ---- reductions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigenvectors", [False, True])
@pytest.mark.parametrize("name", ["labels in another order", "labels without records", "more records than labels",
                                  "fewer markers than rows", "more markers than rows"])  # fmt: skip
def test_reduction_serves_again(name: str, eigenvectors: bool, same_as_dense: Callable[..., None]) -> None:
    V = MODELS[name]
    term = V.operand("g")
    assert isinstance(term, CovariancePropagation)
    if isinstance(term.G, KnownMatrix):
        counts = term.Z().sum(0)
        reduction = reduce_kernel(term.G.K.clone(), counts, eigenvectors=eigenvectors)
    else:
        reduction = reduce_factor(term.Z(), eigenvectors=eigenvectors)
    assert isinstance(reduction, SpectralDecomposition if eigenvectors else BandReduction)
    solver, theta = SpectralSolver(reduction), torch.tensor([0.1, -0.2], dtype=torch.float64)
    problem = solver.prepare(V, y, X)
    assert problem.reduction is reduction
    same_as_dense(V, theta, y, X, solver)
    response = normal(N)
    ours, dense = (REML(V, s)(response, X[:, :2], theta) for s in (solver, "dense"))
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=0.0)


def test_reduction_of_a_problem() -> None:
    V = MODELS["more records than labels"]
    problem = SpectralSolver().prepare(V, y, X)
    assert isinstance(problem, SpectralProblem)
    assert SpectralSolver(problem.reduction).refusal(V) is None


def test_reduction_of_another_kernel_is_refused() -> None:
    solver = SpectralSolver(reduce_kernel(K))
    assert solver.refusal(MODELS["labels in another order"]) is None
    for name in ("singular kernel", "more records than labels", "labels without records", "fewer markers than rows"):
        with pytest.raises(ValueError, match="another kernel, or of other records"):
            solver.prepare(MODELS[name], y, X)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("V", "reason"),
    [
        (ScalarMatrix(N), "one term Z G Z' and one residual"),
        (Sum(g=KnownMatrix(K), h=KnownMatrix(K), residual=ScalarMatrix(N)), "one term Z G Z' and one residual"),
        (Sum(g=KnownMatrix(K), residual=DiagonalMatrix(N)), "one residual"),
        (Sum(g=ScalarMatrix(N), residual=ScalarMatrix(N)), "one residual"),
        (Sum(g=AR1Matrix(N), residual=ScalarMatrix(N)), "known matrix .* got a AR1Matrix"),
        (over(DummyMatrix(LEVELS), DiagonalMatrix(len(LEVELS.unique()))), "known matrix .* got a DiagonalMatrix"),  # type: ignore
        (over(KhatriRaoMatrix(normal(N, 2), DummyMatrix(LEVELS, levels=range(30))),
              KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(SMALL))), "got a KroneckerProduct"),
    ],
)  # fmt: skip
def test_refusal(V: Sum, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpectralSolver().prepare(V, y, X)


def test_memory_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1e5})())
    with pytest.raises(MemoryError, match="90 x 90"):
        SpectralSolver().prepare(MODELS["kernel of the rows"], y, X)


def test_cost_is_told() -> None:
    assert "m = 40" in SpectralSolver().cost(MODELS["fewer markers than rows"])
    assert "no reduction" in SpectralSolver(reduce_kernel(K)).cost(MODELS["kernel of the rows"])


def test_a_residual_variance_goes_to_zero() -> None:
    """Its score is found to a digit even where it is next to nothing, so that the fit sees the boundary."""
    generator = torch.Generator().manual_seed(3)
    K = random_kernel(30, seed=4) + 0.1 * torch.eye(30, dtype=torch.float64)
    ended = set()
    for _ in range(12):
        y = torch.linalg.cholesky(K) @ torch.randn(30, generator=generator, dtype=torch.float64)
        result = fit(Sum({"line": KnownMatrix(K), "residual": ScalarMatrix(30)}), y, solver="spectral")
        assert result.converged, result.reason
        ended.add(result.held)
    assert (0, -1) in ended


EXACT = normal(40, 5)
OFTEN = torch.arange(40) % 10
WITHOUT_NOISE: dict[str, tuple[CovariancePropagation, Tensor, int]] = {
    "factor": (CovariancePropagation(SimpleMatrix(EXACT), ScalarMatrix(5)), EXACT @ normal(5), 34),
    "levels": (CovariancePropagation(DummyMatrix(OFTEN), KnownMatrix(kernel(10, 12))), normal(10)[OFTEN], 30),
}


@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_a_response_without_noise(name: str) -> None:
    """The likelihood has no maximum, and at last no digit: the fit ends before that, and says so."""
    term, response, degrees = WITHOUT_NOISE[name]
    V = Sum(g=term, residual=ScalarMatrix(40))
    with pytest.warns(UserWarning, match="did not converge"):
        result = fit(V, response, solver="spectral")
    assert not result.converged
    assert "no step raises the likelihood" in result.reason
    near = torch.stack([result.theta[0], torch.tensor(-7.0).double()])  # e'Pe is the same there, all else follows b
    there = -float(REML(V, "dense")(response, theta=near))
    assert result.loglik == pytest.approx(there + degrees * (-7.0 - float(result.theta[1])), abs=0.5)


@pytest.mark.parametrize("name", ["labels in another order", "more records than labels", "fewer markers than rows"])
def test_a_response_whose_square_is_no_number(name: str) -> None:
    with pytest.raises(NotPositiveDefinite, match=r"no finite variances|e'Pe is not finite"):
        fit(MODELS[name], 1e160 * y, X, solver="spectral")
