"""The block solver against the dense one, on the same table of cases; what it refuses and what it says."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from openreml_nn import ML, REML, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import MixedModel, Term
from openreml_nn.likelihood import (
    full_loglik,
    observed_information,
    prediction_error_variance,
    restricted_loglik,
)
from openreml_nn.solvers import DenseSolver, Evaluation, NotPositiveDefinite, random_terms
from openreml_nn.solvers.block_pattern import find_pattern
from openreml_nn.solvers.blocks import BlockSolver


def table(subjects: int = 7, times: int = 5, missing: float = 0.0, shuffled: bool = False) -> pd.DataFrame:
    """A repeated-measures table: groups of subjects, a subject's sex, integer times, a covariate, a response."""
    rng = np.random.default_rng(3)
    subject = np.repeat(np.arange(subjects), times)
    frame = pd.DataFrame({
        "subject": [f"s{i:02d}" for i in subject], "group": [f"g{i // 3}" for i in subject],
        "sex": np.where(subject % 2, "f", "m"), "time": np.tile(np.arange(times).cumsum(), subjects),
        "most": np.where(subject == 0, "one", "others"),
    })  # fmt: skip
    frame["x"] = rng.standard_normal(len(frame)).round(2)
    effect = rng.standard_normal((2, subjects))
    slope, noise = 0.2 + 0.1 * effect[1, subject], 0.7 * rng.standard_normal(len(frame))
    frame["y"] = 3 + effect[0, subject] + slope * frame["time"] + noise
    if missing:
        frame = frame[rng.random(len(frame)) > missing].reset_index(drop=True)
    if shuffled:
        frame = frame.sample(frac=1.0, random_state=1).reset_index(drop=True)
    return frame


def within(structure: Callable[..., Matrix]) -> Term:
    return Term(groups="subject", within="time", covariance=structure)


INTERCEPT = {"subject": Term(groups="subject")}
SLOPE = {"subject": Term(groups="subject", design="1 + time")}
NESTED = {"group": Term(groups="group"), "subject": Term(groups="subject")}
AR1 = {"residual": within(AR1Matrix)}
BY_SEX = {"residual": Term(design="0 + sex")}

CASES = {
    "ar1": (table(), {}, AR1),
    "ar1 and intercept": (table(), INTERCEPT, AR1),
    "ar1, ragged, shuffled": (table(9, missing=0.3, shuffled=True), INTERCEPT, AR1),
    "compound symmetric": (table(), {}, {"residual": within(CompoundSymmetricMatrix)}),
    "unstructured": (table(12, 3), {}, {"residual": within(UnstructuredMatrix)}),
    "unstructured, ragged": (table(14, 3, missing=0.2), {}, {"residual": within(UnstructuredMatrix)}),
    "exponential and nugget": (table(), {}, {"e": within(ExponentialMatrix), "nugget": Term()}),
    "by sex": (table(), INTERCEPT, BY_SEX),
    "slope": (table(), SLOPE, {"residual": Term()}),
    "slope, own covariate, by sex": (table(9, missing=0.2), {"s": Term(groups="subject", design="1 + x")}, BY_SEX),
    "two nested levels": (table(12, shuffled=True), NESTED, {"residual": Term()}),
    "two nested levels, ragged, ar1": (table(12, missing=0.3), NESTED, AR1),
    "slope within group, ar1": (table(12), {"group": Term(groups="group", design="1 + x")}, AR1),
    "independent": (table(), {}, BY_SEX),
}


def model(name: str) -> tuple[Matrix, Tensor, Tensor]:
    frame, random, residual = CASES[name]
    data = MixedModel(frame, "y ~ time + sex", random, residual)
    return data.V, data.y, data.X


def some_theta(V: Matrix) -> Tensor:
    theta = 0.3 * torch.randn(V.num_params, dtype=torch.float64)
    theta[[i for i, name in enumerate(V.param_names) if name.startswith("e/") and name.endswith("range")]] = 1.0
    return theta


def both(V: Matrix, y: Tensor, X: Tensor, theta: Tensor) -> list[Evaluation]:
    return [solver.prepare(V, y, X).evaluate(theta) for solver in (BlockSolver(), DenseSolver())]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.detach().abs().max()) + 1e-13)


@pytest.mark.parametrize("objective", [REML, ML])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name: str, objective: type[REML] | type[ML], same_as_dense: Callable[..., None]) -> None:
    V, y, X = model(name)
    same_as_dense(V, some_theta(V), y, X, BlockSolver(), objective=objective, tolerance=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_working_variates(name: str) -> None:
    V, y, X = model(name)
    ours, dense = both(V, y, X, some_theta(V))
    rhs = torch.randn(len(y), 3, dtype=torch.float64)
    close(ours.working_variates(), dense.working_variates())
    close(ours.inner(rhs), dense.inner(rhs))


@pytest.mark.parametrize("name", ["ar1, ragged, shuffled", "slope", "two nested levels, ragged, ar1"])
@pytest.mark.parametrize("loglik", [restricted_loglik, full_loglik])
def test_second_derivatives(name: str, loglik: Callable[[Evaluation], Tensor]) -> None:
    V, y, X = model(name)
    ours, dense = both(V, y, X, some_theta(V))
    close(observed_information(ours, loglik), observed_information(dense, loglik))
    problem = ours.problem
    H = torch.func.hessian(lambda theta: loglik(problem.evaluate(theta)))(ours.theta)
    close(-H, observed_information(dense, loglik))


def test_gradcheck_of_parameters_response_and_design() -> None:
    V, y, X = model("ar1, ragged, shuffled")
    y, X = y.requires_grad_(), X[:, :2].clone().requires_grad_()

    def loglik(theta: Tensor, y: Tensor, X: Tensor) -> Tensor:
        return restricted_loglik(BlockSolver().prepare(V, y, X).evaluate(theta))

    theta = some_theta(V).requires_grad_()
    assert torch.autograd.gradcheck(loglik, (theta, y, X), rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda theta, y: loglik(theta, y, X.detach()), (theta, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_fits_agree(method: str) -> None:
    for name in ("ar1, ragged, shuffled", "slope", "unstructured"):
        V, y, X = model(name)
        ours = fit(V, y, X, method=method, solver=BlockSolver())
        V.set_theta(torch.zeros(V.num_params))
        dense = fit(V, y, X, method=method, solver=DenseSolver())
        assert ours.converged
        assert ours.loglik == pytest.approx(dense.loglik, rel=1e-10)
        np.testing.assert_allclose(ours.variance["estimate"], dense.variance["estimate"], rtol=1e-5)
        np.testing.assert_allclose(ours.fixed_effects["std_error"], dense.fixed_effects["std_error"], rtol=1e-6)


@pytest.fixture
def agree(same_as_dense: Callable[..., None]) -> Callable[[Matrix], None]:
    """Assert that the solver agrees with the dense one on a V, whatever the data."""

    def check(V: Matrix) -> None:
        n = V.shape[0]
        y, X = torch.randn(n, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
        theta = 0.5 * torch.randn(V.num_params, dtype=torch.float64)
        same_as_dense(V, theta, y, X, BlockSolver(), tolerance=1e-10)

    return check


def test_variance_at_its_boundary() -> None:
    V, y, X = model("ar1 and intercept")
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((7, 5))
    y = torch.from_numpy((noise - noise.mean(1, keepdims=True)).ravel())  # subjects do not differ
    result = fit(V, y, X[:, :2], solver=BlockSolver())
    row = result.variance.iloc[0]
    assert result.converged
    assert row["boundary"]
    assert row["estimate"] == 0.0


def test_covariances_that_differ_between_levels(agree: Callable[[Matrix], None]) -> None:
    """Levels with variances of their own are no copies of one another."""
    subject = DummyMatrix(np.repeat(np.arange(4), 3))
    V = Sum(
        a=CovariancePropagation(subject, DiagonalMatrix(4)),
        b=CovariancePropagation(
            CellMatrix(torch.arange(3).repeat(4), subject, ["1", "2", "3"]),
            KroneckerProduct(CompoundSymmetricMatrix(3), DiagonalMatrix(4)),
        ),
        e=ScalarMatrix(12),
    )
    agree(V)
    assert [group.rows.shape for group in find_pattern(V).groups] == [(4, 3, 1)]


def test_rows_of_no_level(agree: Callable[[Matrix], None]) -> None:
    labels = ["a", "a", "b", "b", "?", "?", "c", "c"]
    subject = DummyMatrix(labels, levels=["a", "b", "c", "d"], unknown="zero")
    slope = KhatriRaoMatrix(torch.tensor([[1.0, t % 2] for t in range(8)]), subject)
    V = Sum(
        a=CovariancePropagation(subject, ScalarMatrix(4)),
        b=CovariancePropagation(slope, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(4))),
        e=ScalarMatrix(8),
    )
    agree(V)


def test_residual_variances_of_rows(agree: Callable[[Matrix], None]) -> None:
    subject = DummyMatrix(["a", "a", "b", "b", "c", "c"])
    random = CovariancePropagation(subject, ScalarMatrix(3))
    agree(Sum(a=random, e=DiagonalMatrix(6)))
    agree(Sum(a=random, e=DiagonalPropagation(torch.tensor([[1.0], [2], [1], [2], [1], [3]]), ScalarMatrix(1))))
    agree(Sum(a=random, known=OwnDiagonal(6), e=ScalarMatrix(6)))


class OwnDiagonal(DiagonalMatrix):
    """A user's own diagonal structure, about which nothing else is known."""


def test_equal_blocks_are_factored_once() -> None:
    V, _, _ = model("ar1 and intercept")
    assert [group.rows.shape for group in find_pattern(V).groups] == [(1, 5, 7)]
    V, _, _ = model("two nested levels")
    assert [group.rows.shape for group in find_pattern(V).groups] == [(1, 15, 4)]
    V, _, _ = model("independent")
    assert [group.rows.shape for group in find_pattern(V).groups] == [(1, 1, 15), (1, 1, 20)]


def test_order_of_rows_does_not_matter() -> None:
    frame = table()
    shuffled = frame.sample(frac=1.0, random_state=2)
    values = []
    for data in (MixedModel(f, "y ~ time", SLOPE, AR1) for f in (frame, shuffled)):
        pattern = find_pattern(data.V)
        assert [group.rows.shape for group in pattern.groups] == [(1, 5, 7)]
        theta = torch.full((data.V.num_params,), 0.1, dtype=torch.float64)
        values.append(restricted_loglik(BlockSolver().prepare(data.V, data.y, data.X).evaluate(theta)))
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)


def test_number_of_groups_stays_small(agree: Callable[[Matrix], None]) -> None:
    """Patterns of 1 to 11 copies make five groups, one for each power of two."""
    rows = [(f"{times}-{copy}", time) for times in range(1, 12) for copy in range(times) for time in (0, times)]
    subject = DummyMatrix([r[0] for r in rows])
    cells = CellMatrix(torch.tensor([r[1] for r in rows]), subject, [str(i) for i in range(12)])
    G = KroneckerProduct(AR1Matrix(12), IdentityMatrix(subject.num_levels))
    V = Sum(e=CovariancePropagation(cells, G), nugget=ScalarMatrix(len(rows)))
    assert [group.rows.shape for group in find_pattern(V).groups] == [
        (1, 2, 1), (1, 2, 2), (2, 2, 4), (4, 2, 8), (3, 2, 11)
    ]  # fmt: skip
    agree(V)


def test_large_problem_is_never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows: their V would take 3 GiB; a fit and its prediction errors go through elements and blocks only."""

    def never(*_: object) -> Tensor:
        raise AssertionError("a dense V or Z G Z' is built")

    for kind in (Sum, CovariancePropagation):
        monkeypatch.setattr(kind, "build", never)
        monkeypatch.setattr(kind, "add_to", never)
    frame = table(2000, 10)
    data = MixedModel(frame, "y ~ time", INTERCEPT, AR1)
    result = fit(data.V, data.y, data.X, solver=BlockSolver())
    assert result.converged
    (term,) = random_terms(data.V, data.V.theta.detach())
    assert prediction_error_variance(result.evaluation, term).shape == (2000,)


CROSSED = {"subject": Term(groups="subject"), "time": Term(groups="time")}
REFUSED = {
    "crossed": (CROSSED, {"residual": Term()}, "'subject' and 'time' correlate 35 of 35 rows in one block"),
    "one large group": ({"most": Term(groups="most")}, {"residual": Term()},
                        "'most' correlate 30 of 35 rows in one block"),
    "kernel": ({"subject": Term(groups="subject", relationship=CompoundSymmetricMatrix)}, {"residual": Term()},
               "correlated only within a level, and those of its operand 'subject' are not"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    random, residual, message = REFUSED[name]
    data = MixedModel(table(), "y ~ time", random, residual)
    with pytest.raises(ValueError, match=message) as error:
        BlockSolver().prepare(data.V, data.y, data.X)
    assert "The blocks solver cannot take this V" in str(error.value)


def test_refuses_a_dense_operand() -> None:
    V = Sum(K=SimpleMatrix(torch.ones(4, 4)), e=ScalarMatrix(4))
    assert "its operand 'K' is a SimpleMatrix" in str(BlockSolver().refusal(V))
    assert "V is a SimpleMatrix" in str(BlockSolver().refusal(SimpleMatrix(torch.eye(4))))


def test_cost_is_told() -> None:
    V, _, _ = model("ar1 and intercept")
    assert BlockSolver().refusal(V) is None
    assert BlockSolver().cost(V) == (
        "at most Σ m³ = 8.8e+02 multiplications for 7 blocks of m ≤ 5 rows, equal blocks once"
    )


def test_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from openreml_nn.solvers import memory

    class Little:
        available = 1000

    monkeypatch.setattr(memory.psutil, "virtual_memory", Little)
    V, y, X = model("ar1")
    with pytest.raises(MemoryError, match="in blocks of 25 elements"):
        BlockSolver().prepare(V, y, X)


def test_not_positive_definite_names_the_block() -> None:
    subject = DummyMatrix(["a", "a", "b", "b", "b", "c", "c"])
    times = CellMatrix(torch.tensor([0, 1, 0, 1, 1, 0, 1]), subject, ["0", "1"])
    V = Sum(subject=CovariancePropagation(times, KroneckerProduct(AR1Matrix(2), IdentityMatrix(3))))
    y = torch.arange(7.0).square()
    with pytest.raises(NotPositiveDefinite, match=r"block of subject 'b', rows 2, 3, 4, has no Cholesky factor"):
        BlockSolver().prepare(V, y).evaluate()
