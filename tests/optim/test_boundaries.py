"""Ends of the parameter space: found, held, reported and left again; models that have no answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.optim import ConfoundedParameters
from openreml_nn.optim.boundaries import Place, leaps

ProblemOf = Callable[[str], tuple[Matrix, Tensor, Tensor]]
MakeLoop = Callable[..., Any]

# ---- boundaries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [-20.0, -8.0, 0.0, 4.0])
def test_a_zero_variance_is_found_from_anywhere(start: float, problem_of: ProblemOf) -> None:
    V, y, X = problem_of("dyestuff2")
    result = fit(V, y, X, start=torch.tensor([start, 1.0], dtype=torch.float64))
    assert result.converged
    assert result.held == (-1, 0)
    assert result.loglik == pytest.approx(-80.91413890614425, abs=1e-9)
    assert result.variance["estimate"][0] == 0.0
    assert bool(result.variance["boundary"][0])


@pytest.mark.parametrize("start", [-12.0, -20.0, -25.0])
def test_a_variance_that_starts_at_next_to_nothing_comes_back(start: float, problem_of: ProblemOf) -> None:
    V, y, X = problem_of("dyestuff")
    result = fit(V, y, X, start=torch.tensor([start, 3.0], dtype=torch.float64))
    assert result.converged
    assert result.held == (0, 0)
    assert result.variance["estimate"][0] == pytest.approx(1764.05, rel=1e-6)


def test_a_held_parameter_is_let_go_when_its_score_turns(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    """A term is held at zero while another one, started far too large, takes its share."""
    V, y, X = problem_of("john_alpha")
    loop = make_loop(V, y, X)
    V.set_theta(torch.tensor([-1.0, -1.3, -1.2], dtype=torch.float64))
    loop.run(most=1)
    memory = loop.optimizer.state[V.theta_parameters()[0]]
    theta = torch.tensor([-16.0, -1.3, -1.2], dtype=torch.float64)
    V.set_theta(theta)
    loop.run(most=1)  # evaluates at the new place, then steps
    memory["held"][0] = -1
    path = loop.run()
    assert loop.optimizer.progress.converged
    assert loop.optimizer.progress.held == (0, 0, 0)
    assert path[-1] == pytest.approx(-46.59691012098524, abs=1e-8)


def test_boundary_column_of_a_cholesky_factor_changes_sign(problem_of: ProblemOf) -> None:
    """From a start with the wrong sign of a covariance the diagonal entry runs to zero: a stationary point that is no
    maximum, since the column may change its sign there."""
    V, y, X = problem_of("sleepstudy")
    best = fit(V, y, X).loglik
    for theta in ([-3.0, -8.0, 1.0, 3.2], [-9.0, -8.0, -2.0, 3.2], [-9.0, 8.0, -2.0, 3.2]):
        result = fit(V, y, X, start=torch.tensor(theta, dtype=torch.float64))
        assert result.converged
        assert result.loglik == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_correlation_near_one(sign: float) -> None:
    """A random walk, and one that alternates, under AR(1): the maximum is at |ρ| > 0.95, within the edge."""
    g = np.random.default_rng(0)
    y = np.cumsum(g.normal(size=60)) * sign ** np.arange(60)
    result = fit(AR1Matrix(60), torch.tensor(y))
    assert result.converged, result.reason
    rho = result.variance["estimate"][1]
    assert 0.95 < sign * rho < 1.0
    assert abs(fit(AR1Matrix(60), torch.tensor(y), start=torch.tensor([0.0, 6.0 * sign])).loglik - result.loglik) < 1e-7


def test_compound_symmetry_at_its_lower_end() -> None:
    """Groups whose members sum to nearly the same: ρ runs to −1/(m − 1), and the edge is reported."""
    g = np.random.default_rng(1)
    y = g.normal(size=(20, 3))
    y = torch.tensor((y - y.mean(axis=1, keepdims=True) + 5.0).ravel())
    group = DummyMatrix(np.repeat(np.arange(20), 3))
    cells = KhatriRaoMatrix(np.tile(np.eye(3), (20, 1)), group)
    V = Sum(
        within=CovariancePropagation(cells, KroneckerProduct(CompoundSymmetricMatrix(3), IdentityMatrix(20))),
        residual=ScalarMatrix(60, start=1e-4),
    )
    V.operand("residual").set_no_grad([0])
    result = fit(V, y)
    assert result.converged
    assert result.held[1] == -1
    assert result.variance["estimate"][1] == pytest.approx(-0.5)
    assert "on the boundary of within/rho" in result.reason


# ---- models that have no answer --------------------------------------------------------------------------------------


def _groups() -> tuple[DummyMatrix, Tensor]:
    g = np.random.default_rng(2)
    level = np.repeat(np.arange(10), 4)
    return DummyMatrix(level), torch.tensor(g.normal(size=10)[level] + g.normal(size=40))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda Z: Sum(a=_term(Z), b=_term(Z), residual=ScalarMatrix(40)), ("a/sigma^2", "b/sigma^2")),
        (lambda Z: Sum(a=_term(Z), b=ScalarMatrix(40), residual=ScalarMatrix(40)), ("b/sigma^2", "residual/sigma^2")),
        (lambda Z: Sum(a=_term(DummyMatrix(range(40))), residual=ScalarMatrix(40)), ("a/sigma^2", "residual/sigma^2")),
        (lambda Z: CompoundSymmetricMatrix(40), ("sigma^2", "rho")),
    ],
    ids=["same term twice", "two residuals", "level for each row", "one block"],
)
def test_confounded_parameters_are_named(make: Callable[[DummyMatrix], Matrix], names: tuple[str, ...]) -> None:
    Z, y = _groups()
    with pytest.raises(ConfoundedParameters) as info:
        fit(make(Z), y, solver="dense")
    assert f"cannot tell these parameters apart: {', '.join(names)}." in str(info.value)
    assert "Remove one of the terms, or fix one of the parameters" in str(info.value)


def _term(Z: DummyMatrix) -> CovariancePropagation:
    return CovariancePropagation(Z, ScalarMatrix(Z.num_levels))


def test_confounding_is_cured_by_fixing_one_parameter() -> None:
    Z, y = _groups()
    V = Sum(a=_term(Z), b=ScalarMatrix(40, start=0.1), residual=ScalarMatrix(40))
    V.set_no_grad(param_name="b/sigma^2")
    whole = fit(Sum(a=_term(Z), residual=ScalarMatrix(40)), y)
    result = fit(V, y)
    assert result.loglik == pytest.approx(whole.loglik)
    assert result.variance["estimate"][1] == pytest.approx(0.1)


def test_no_finite_maximum_is_not_converged() -> None:
    """A trend under an exponential covariance: variance and range run to infinity together (a linear variogram)."""
    x = np.arange(40.0)
    y = torch.tensor(3.0 * x + np.random.default_rng(3).normal(size=40))
    for V in (Sum(field=ExponentialMatrix(x), residual=ScalarMatrix(40)), AR1Matrix(40)):
        with pytest.warns(UserWarning, match="The fit did not converge"):
            result = fit(V, y)
        assert not result.converged
        assert "no finite maximum" in result.reason or "no step raises" in result.reason
        assert "NOT CONVERGED" in result.summary()


# ---- places and leaps ------------------------------------------------------------------------------------------------


def place(g: float, d: float, theta: float, moved: float, finite: tuple[bool, bool], **other: Any) -> Place:
    """Where a single parameter is."""
    arrays = {"held": np.zeros(1, dtype=int), "mirrors": np.zeros((1, 1), dtype=bool)} | other
    return Place(
        g=np.array([g]), d=np.array([d]), theta=np.array([theta]), moved=np.array([moved]),
        finite=np.array([[finite[0]], [finite[1]]]), **arrays,
    )  # fmt: skip


VARIANCE, CORRELATION, LOADING = (True, False), (True, True), (False, False)


@pytest.mark.parametrize(
    ("where", "runs", "returns"),
    [
        (place(-1e-6, 1e-11, -12.0, -11.0, VARIANCE), -1, 0),
        (place(-1e-6, 1e-11, -12.0, 8.0, VARIANCE), -1, 0),
        (place(1e-6, 1e-11, -12.0, -11.0, VARIANCE), 0, 1),
        (place(1e-6, 1e-11, -12.0, 0.0, VARIANCE), 0, 1),
        (place(1e-6, 1e-11, 20.0, 19.0, VARIANCE), 1, 0),
        (place(1e-6, 1e-11, 12.0, 0.0, CORRELATION), 1, 0),
        (place(-1e-6, 1e-11, 12.0, 0.0, CORRELATION), 0, -1),
        (place(-1e-6, 1e-11, -12.0, 0.0, CORRELATION), -1, 0),
        (place(1e-6, 1e-11, 40.0, 30.0, LOADING), 1, 0),
        (place(1e-6, 1e-11, 40.0, -30.0, LOADING), 0, 0),
        (place(-0.5, 1e-11, -12.0, -11.0, VARIANCE), 0, 0),
        (place(-1e-6, 0.5, -12.0, -11.0, VARIANCE), 0, 0),
        (place(-1e-9, 1e-11, -12.0, -11.0, VARIANCE), 0, 0),
        (place(-1e-17, 1e-26, -16.0, -15.0, VARIANCE), -1, 0),
        (place(1e-17, 1e-26, -16.0, -15.0, VARIANCE), 0, 0),
        (place(-1e-17, 1e-26, -16.0, -15.0, CORRELATION), 0, 0),
        (place(0.0, 0.0, -40.0, -30.0, CORRELATION), -1, 0),
        (place(0.0, 0.0, 0.0, 0.0, CORRELATION), 0, 0),
        (place(-1e-6, 1e-11, -12.0, -11.0, VARIANCE, held=np.array([-1])), 0, 0),
    ],
)
def test_running_to_an_end_or_coming_back(where: Place, runs: int, returns: int) -> None:
    got = where.flat(1e-3)
    assert (got[0][0], got[1][0]) == (runs, returns)


def test_leaps() -> None:
    still = np.zeros(1)
    (out,) = leaps(place(-1e-6, 1e-11, -9.0, -9.0, VARIANCE), still)
    assert out.step.tolist() == [-13.0]
    (back,) = leaps(place(1e-6, 1e-11, -9.0, -9.0, VARIANCE), still)
    assert back.step[0] == pytest.approx(0.5 * np.log1p(1e5))
    assert back.promised == pytest.approx(0.5 * 1e-12 / 1e-11)
    assert leaps(place(1e-6, 1e-11, 20.0, 19.0, VARIANCE), still) == []
    assert leaps(place(-2.0, 1.5, 0.0, 0.0, VARIANCE), still) == []


def test_a_variance_that_newtons_step_leads_below_zero() -> None:
    (out,) = leaps(place(-0.1, 0.5, -1.0, -1.0, VARIANCE), np.array([-2.5]))
    assert (out.step.tolist(), out.linear.tolist()) == ([-13.0], [-0.5])
    for newton, kind in ((-1.5, VARIANCE), (-2.5, CORRELATION), (-2.5, LOADING)):
        assert leaps(place(-0.1, 0.5, -1.0, -1.0, kind), np.array([newton])) == []


def test_a_column_changes_sign_where_newtons_step_leads_through_zero() -> None:
    mirrors = np.array([[False, True], [False, False]])
    where = Place(
        g=np.array([-3.0, 0.5]), d=np.array([1.0, 1.0]), theta=np.array([0.0, 2.0]), moved=np.zeros(2),
        held=np.zeros(2, dtype=int), finite=np.array([[True, False], [False, False]]), mirrors=mirrors,
    )  # fmt: skip
    (leap,) = leaps(where, np.zeros(2))
    assert leap.alone
    assert leap.signs.tolist() == [1.0, -1.0]
    assert leap.step.tolist() == [pytest.approx(np.log(2.0)), 0.0]
