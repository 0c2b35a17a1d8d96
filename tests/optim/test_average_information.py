"""The optimiser: laws that hold for every model, and the cases in which others fail."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openreml_nn import REML, AverageInformation, FitResult, fit
from openreml_nn.covariance import (
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import MixedModel, read_table
from openreml_nn.likelihood import average_information
from openreml_nn.optim import (
    Average,
    Direction,
    Fisher,
    FixedStep,
    Halving,
    Observed,
    StepControl,
    TrustRegion,
)
from openreml_nn.solvers import NotPositiveDefinite

ProblemOf = Callable[[str], tuple[Matrix, Tensor, Tensor]]
MakeLoop = Callable[..., Any]
NAMES = ("dyestuff", "dyestuff2", "john_alpha", "sleepstudy", "oats", "cake", "orthodont", "fa1", "serial")
BOUNDARY = {"dyestuff2": "of Batch/sigma^2", "cake": "where the covariance of rep is singular"}


# ---- every accepted step raises ℓ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_raises_the_likelihood(name: str, seed: int, problem_of: ProblemOf) -> None:
    V, y, X = problem_of(name)
    start = torch.randn(V.num_params, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = fit(V, y, X, start=2.0 * start)
    assert result.converged, result.reason
    first = -float(REML(V)(y, X, 2.0 * start))
    before = [(first, np.inf), *((h.loglik, h.decrement) for h in result.history)]
    for (low, old), (high, new) in itertools.pairwise(before):
        rounding = 1e-12 * max(1.0, abs(high))
        assert high > low or (high > low - rounding and new <= old)


@pytest.mark.parametrize("name", NAMES)
def test_converged_means_that_the_score_is_zero(name: str, problem_of: ProblemOf) -> None:
    V, y, X = problem_of(name)
    result = fit(V, y, X)
    assert result.converged
    leaf = result.theta.clone().requires_grad_()
    (score,) = torch.autograd.grad(-REML(V)(y, X, leaf), leaf)
    free = np.array(result.held) == 0
    se = np.sqrt(np.diag(result.theta_cov))[free]
    assert np.abs(score.numpy()[free] * se).max() < 4e-6  # a decrement of 1e-11
    last = result.history[-1]
    assert last.done
    assert last.decrement < 1e-11
    assert last.score_norm == pytest.approx(float(np.linalg.norm(score.numpy()[free])), abs=1e-9)
    assert all(not h.done for h in result.history[:-1])
    if name in BOUNDARY:
        assert result.reason == f"the score is zero, on the boundary {BOUNDARY[name]}"
        assert -1 in result.held
    else:
        assert result.reason == "the score is zero"
        assert not any(result.held)


MOST_STEPS = {"dyestuff": 4, "dyestuff2": 6, "john_alpha": 10, "sleepstudy": 8, "oats": 14, "cake": 17,
              "orthodont": 12, "fa1": 17, "serial": 11}  # fmt: skip


@pytest.mark.parametrize("name", MOST_STEPS)
def test_number_of_steps_from_the_data_start(name: str, problem_of: ProblemOf) -> None:
    assert fit(*problem_of(name)).n_iter <= MOST_STEPS[name]


@pytest.mark.parametrize("name", ["john_alpha", "sleepstudy", "dyestuff2", "serial", "oats", "cake"])
def test_twenty_random_starts_reach_the_same_maximum(name: str, problem_of: ProblemOf) -> None:
    """Uniform within ± 4 of the maximum on the raw scale (of 0 where the maximum is on a boundary)."""
    V, y, X = problem_of(name)
    best = fit(V, y, X)
    centre = torch.where(torch.tensor(best.held) == 0, best.theta, 0.0)
    generator = torch.Generator().manual_seed(20)
    for _ in range(20):
        start = centre + 8.0 * torch.rand(V.num_params, generator=generator, dtype=torch.float64) - 4.0
        result = fit(V, y, X, start=start)
        assert result.converged, result.reason
        assert result.loglik == pytest.approx(best.loglik, abs=1e-7)
        np.testing.assert_allclose(result.variance["estimate"], best.variance["estimate"], rtol=1e-5, atol=1e-6)


# ---- invariance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["john_alpha", "sleepstudy", "dyestuff2", "fa1", "serial"])
@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (1.0, 1e8)])
def test_scale_and_shift_of_the_response(name: str, scale: float, shift: float, problem_of: ProblemOf) -> None:
    V, y, X = problem_of(name)
    plain = fit(V, y, X)
    powers = np.concatenate([_natural_powers(leaf) for _, leaf, _ in V.leaves()])
    V.set_theta(torch.zeros(V.num_params, dtype=torch.float64))
    other = fit(V, scale * y + shift, X)
    assert other.converged
    assert abs(other.n_iter - plain.n_iter) <= 1
    assert other.held == plain.held
    got = other.variance["estimate"] / scale ** (2.0 * powers)
    np.testing.assert_allclose(got, plain.variance["estimate"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(other.beta[1:], scale * plain.beta[1:], rtol=1e-6)


def _natural_powers(leaf: Matrix) -> list[float]:
    """How natural parameters scale with V: an unstructured matrix reports variances, not Cholesky entries."""
    return [1.0] * leaf.num_params if isinstance(leaf, UnstructuredMatrix) else leaf.scale_powers


def test_order_of_rows() -> None:
    table = read_table("john_alpha")
    plain = fit_model(MixedModel(table, "yield ~ rep", random=["gen", "rep:block"]))
    shuffled = table.sample(frac=1.0, random_state=3)
    other = fit_model(MixedModel(shuffled, "yield ~ rep", random=["gen", "rep:block"]))
    assert abs(other.n_iter - plain.n_iter) <= 1
    np.testing.assert_allclose(other.variance["estimate"], plain.variance["estimate"], rtol=1e-9)


def fit_model(model: MixedModel, **options: Any) -> FitResult:
    return fit(model.V, model.y, model.X, x_names=model.x_names, **options)


# ---- ends without a maximum ------------------------------------------------------------------------------------------


def test_limit_of_steps(problem_of: ProblemOf) -> None:
    V, y, X = problem_of("sleepstudy")
    with pytest.warns(UserWarning, match="The fit did not converge: the limit of 2 steps was reached"):
        result = fit(V, y, X, max_steps=2)
    assert not result.converged
    assert result.n_iter == 2
    assert result.reason == "the limit of 2 steps was reached"


def test_parameters_that_are_all_fixed(make_loop: MakeLoop) -> None:
    V = Sum(a=ScalarMatrix(5, start=2.0), residual=ScalarMatrix(5, start=1.0))
    V.set_no_grad([0, 1])
    y = torch.tensor([1.0, 2.0, 4.0, 3.0, 7.0])
    result = fit(V, y)
    assert result.converged
    assert (result.n_iter, result.reason) == (0, "all variance parameters are fixed")
    assert result.loglik == pytest.approx(-float(REML(V)(y)))
    assert result.variance["fixed"].all()
    loop = make_loop(V, y, torch.ones(5, 1))
    with pytest.raises(ValueError, match="no parameter to move; all are fixed"):
        AverageInformation(V.theta_parameters(), loop.information).step(lambda: torch.tensor(1.0))


# ---- trials that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["nan", "inf", "not positive definite", "linear algebra"])
def test_a_trial_that_fails_is_a_rejected_step(trouble: str, problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    """The same maximum, though some of the trial points are refused."""
    V, y, X = problem_of("john_alpha")
    best = fit(V, y, X)
    V.set_theta(torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64))
    loop, calls = make_loop(V, y, X), itertools.count()

    def closure() -> Tensor:
        loss = loop.closure()
        if next(calls) % 4 == 1:
            if trouble == "not positive definite":
                raise NotPositiveDefinite("V")
            if trouble == "linear algebra":
                raise torch.linalg.LinAlgError("V")
            return loss * torch.tensor(torch.nan if trouble == "nan" else torch.inf)
        return loss

    tried = 0
    for _ in range(100):
        loop.optimizer.step(closure)
        tried += loop.optimizer.progress.trials
        if loop.optimizer.progress.done:
            break
    assert loop.optimizer.progress.loglik == pytest.approx(best.loglik, abs=1e-8)
    assert tried > loop.optimizer.progress.iteration


def test_matrix_that_is_definite_only_in_part_of_the_space() -> None:
    """V = I + c (J − I) with c free of any transform: a step to c > 1 or c < −1/(n−1) has no Cholesky factor."""

    class Free(Matrix):
        def __init__(self) -> None:
            super().__init__((6, 6), ["c"])

        def build(self, params: Tensor) -> Tensor:
            I = torch.eye(6, dtype=params.dtype)
            return I + params[0] * (1.0 - I)

    y = torch.tensor([1.0, 1.02, 0.98, 1.01, 0.99, 1.0])
    result = fit(Free(), y, torch.zeros(6, 0), start=torch.tensor([0.9], dtype=torch.float64))
    assert result.converged, result.reason
    assert 0.0 < result.variance["estimate"][0] < 1.0
    assert sum(h.trials for h in result.history) > result.n_iter


def test_objective_that_is_nan_at_the_start() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = AverageInformation([p], lambda: torch.eye(1))
    with pytest.raises(ValueError, match="The objective is nan at the start values; give others"):
        optimizer.step(lambda: p.sum() * torch.nan)


def test_errors_of_the_closure_at_the_start_are_not_swallowed() -> None:
    p = nn.Parameter(torch.zeros(1))

    def closure() -> Tensor:
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        AverageInformation([p], lambda: torch.eye(1)).step(closure)


# ---- directions and controls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [Average(), Fisher(), Observed()], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("control", [TrustRegion(), Halving()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", ["john_alpha", "sleepstudy"])
def test_directions_and_controls_agree(
    name: str, direction: Direction, control: StepControl, problem_of: ProblemOf
) -> None:
    V, y, X = problem_of(name)
    best = fit(V, y, X)
    result = fit(V, y, X, start="data", direction=direction, control=control, solver="dense")
    assert result.converged, result.reason
    assert result.loglik == pytest.approx(best.loglik, abs=1e-8)
    np.testing.assert_allclose(result.variance["estimate"], best.variance["estimate"], rtol=1e-5)


def test_fixed_steps(problem_of: ProblemOf) -> None:
    V, y, X = problem_of("john_alpha")
    best = fit(V, y, X)
    result = fit(V, y, X, start=best.theta + 0.1, control=FixedStep())
    assert result.converged
    short = fit(V, y, X, start=best.theta + 0.1, control=FixedStep(0.5))
    assert short.loglik == pytest.approx(best.loglik, abs=1e-6)
    assert short.n_iter > result.n_iter
    with pytest.warns(UserWarning, match="The fit did not converge: no step raises the likelihood"):
        far = fit(V, y, X, start=best.theta + torch.tensor([0.0, 0.0, 4.0]), control=FixedStep(50.0))
    assert not far.converged
    assert "no step raises the likelihood" in far.reason


# ---- an optimiser among others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["john_alpha", "sleepstudy"])
def test_adam_and_lbfgs_reach_the_same_likelihood(name: str, problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    V, y, X = problem_of(name)
    best = fit(V, y, X)
    start = best.theta + torch.linspace(-0.5, 0.5, V.num_params, dtype=torch.float64)
    objective = REML(V)

    V.set_theta(start)
    adam = torch.optim.Adam(objective.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 250)
    for _ in range(250):
        adam.zero_grad()
        loss = objective(y, X)
        loss.backward()
        adam.step()
        schedule.step()
    assert -float(objective(y, X).detach()) == pytest.approx(best.loglik, abs=1e-4)

    V.set_theta(start)
    lbfgs = torch.optim.LBFGS(objective.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = objective(y, X)
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert -float(objective(y, X).detach()) == pytest.approx(best.loglik, abs=1e-6)

    V.set_theta(start)
    loop = make_loop(V, y, X)
    assert loop.run()[-1] == pytest.approx(best.loglik, abs=1e-9)


def test_without_geometry(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    V, y, X = problem_of("john_alpha")
    loop = make_loop(V, y, X)
    loop.optimizer = AverageInformation(V.theta_parameters(), loop.information)
    assert loop.run()[-1] == pytest.approx(-46.59691012098524, abs=1e-8)


def test_parameters_of_any_shape() -> None:
    """A quadratic in a matrix and a vector: one step."""
    A, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(3))

    def loss() -> Tensor:
        value = 2.0 * (A - 3.0).square().sum() + 2.0 * (b + 1.0).square().sum()
        for p in (A, b):
            p.grad = None
        value.backward()
        return value

    optimizer = AverageInformation([A, b], lambda: 4.0 * torch.eye(7), control=Halving())
    while not optimizer.state or not optimizer.progress.done:
        optimizer.step(loss)
    assert optimizer.progress.iteration == 1
    torch.testing.assert_close(A.detach(), torch.full((2, 2), 3.0))
    torch.testing.assert_close(b.detach(), torch.full((3,), -1.0))


def test_step_leaves_score_and_thetas_that_belong_together(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    """Gradients and thetas after a step are those of the accepted point, not those of the last trial."""
    V, y, X = problem_of("sleepstudy")
    V.set_theta(torch.tensor([4.0, -1.0, -2.0, 1.0], dtype=torch.float64))
    loop = make_loop(V, y, X)
    for _ in range(6):
        loss = loop.optimizer.step(loop.closure)
        leaf = V.theta.detach().clone().requires_grad_()
        expected = REML(V, "dense")(y, X, leaf)
        (gradient,) = torch.autograd.grad(expected, leaf)
        assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-10)
        torch.testing.assert_close(torch.cat([p.grad for p in V.theta_parameters()]), gradient)  # type: ignore[misc]
        assert loop.optimizer.progress.loglik == -float(loss)
        assert loop.optimizer.information.shape == (4, 4)


def test_parameters_fixed_between_fits(problem_of: ProblemOf) -> None:
    V, y, X = problem_of("john_alpha")
    fit(V, y, X)
    V.set_no_grad([1])
    held = V.theta[1].item()
    some = fit(V, y + 0.5 * torch.randn(len(y), dtype=torch.float64), X)
    assert V.theta[1].item() == held
    assert len(some.history[-1].held) == 2
    V.set_no_grad([])
    again = fit(V, y, X, start="data")
    assert again.loglik == pytest.approx(-46.59691012098524, abs=1e-8)


def test_thetas_changed_from_outside_start_anew(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    V, y, X = problem_of("john_alpha")
    loop = make_loop(V, y, X)
    V.set_theta(torch.tensor([-1.0, -1.3, -1.2], dtype=torch.float64))
    loop.run()
    assert loop.optimizer.progress.done
    done = loop.optimizer.progress.iteration
    assert done > 0
    loop.optimizer.step(loop.closure)
    assert loop.optimizer.progress.iteration == done  # a step after the end changes nothing
    V.set_theta(torch.zeros(3, dtype=torch.float64))
    loop.optimizer.step(loop.closure)
    assert loop.optimizer.progress.iteration == 1
    assert loop.run()[-1] == pytest.approx(-46.59691012098524, abs=1e-8)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleepstudy", "dyestuff2", "cake"])
def test_a_checkpoint_continues_bit_for_bit(name: str, problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    V, y, X = problem_of(name)
    start = V.theta.detach() + 0.7
    V.set_theta(start)
    whole = make_loop(V, y, X).run()
    for stop in {1, 2, len(whole) // 2, len(whole) - 2}:
        V.set_theta(start)
        first = make_loop(V, y, X)
        first.run(most=stop)
        file = io.BytesIO()
        torch.save({"model": V.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, _, _ = problem_of(name)
        second = make_loop(other, y, X)
        other.load_state_dict(saved["model"])
        second.optimizer.load_state_dict(saved["optimizer"])
        assert second.run() == whole[stop:]
        assert second.optimizer.progress.iteration == len(whole)


def test_checkpoint_before_the_first_step(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    V, y, X = problem_of("john_alpha")
    loop = make_loop(V, y, X)
    loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    with pytest.raises(ValueError, match="has made no step yet"):
        loop.optimizer.progress


def test_checkpoint_without_a_decrement(problem_of: ProblemOf, make_loop: MakeLoop) -> None:
    loop = make_loop(*problem_of("sleepstudy"))
    loop.run(most=2)
    expected, saved = loop.optimizer.progress, copy.deepcopy(loop.optimizer.state_dict())
    del saved["state"][0]["decrement"]
    loop.optimizer.load_state_dict(saved)
    assert loop.optimizer.progress == expected


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_steps_learn_from_long_ones(problem_of: ProblemOf) -> None:
    """With the information after a step instead of the mean along it there are two more."""
    assert fit(*problem_of("fa1")).n_iter <= 10


def test_a_step_that_leaves_next_to_nothing_teaches_at_once() -> None:
    """An information that is half a percent too large: the second step knows it, not only the third."""
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def closure() -> Tensor:
        x.grad = 2.0 * x.detach()
        return x.detach().square().sum()

    optimizer = AverageInformation([x], information=lambda: torch.full((1, 1), 2.01, dtype=torch.float64))
    while not (optimizer.step(closure) < 0 or optimizer.progress.done):
        pass
    assert (optimizer.progress.iteration, optimizer.progress.converged) == (2, True)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments() -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="one group"):
        AverageInformation([{"params": [p]}, {"params": [q]}], lambda: torch.eye(2))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="tolerance above 0, got 0"):
        AverageInformation([p], lambda: torch.eye(1), tolerance=0)

    def closure() -> Tensor:
        p.grad = torch.ones(1)
        return p.sum()

    with pytest.raises(ValueError, match=r"`information` must give a matrix of shape \(1, 1\), got \(2, 2\)"):
        AverageInformation([p], lambda: torch.eye(2)).step(closure)


def test_a_loss_without_gradients_is_no_maximum() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="left no gradient in any parameter"):
        AverageInformation([p], lambda: torch.eye(1)).step(lambda: p.square().sum())


def test_writing_through_data_starts_anew(problem_of: ProblemOf) -> None:
    """``p.data`` leaves no trace in the version of a parameter."""
    V, y, X = problem_of("dyestuff")
    objective = REML(V)
    problem = objective.prepare(y, X)
    current = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        current[:] = [problem.evaluate()]
        loss = -objective.loglik(current[0])
        loss.backward()
        return loss

    optimizer = AverageInformation(V.theta_parameters(), lambda: average_information(current[0]))
    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.progress.iteration == 2
    for p in V.theta_parameters():
        p.data.fill_(0.5)
    optimizer.step(closure)
    assert optimizer.progress.iteration == 1
