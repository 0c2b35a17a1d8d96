"""A fit without Lightning: objective, optimiser and loop in one call."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.likelihood import average_information
from openreml_nn.objectives import ML, REML, Objective
from openreml_nn.optim import (
    Average,
    AverageInformation,
    Direction,
    Geometry,
    Progress,
    StepControl,
    data_start,
    require_estimable,
)
from openreml_nn.result import FitResult
from openreml_nn.solvers import ALONE, SOLVERS, Evaluation, Problem, Ranks, Solver

log = logging.getLogger("openreml_nn")
OBJECTIVES: dict[str, type[Objective]] = {"REML": REML, "ML": ML}
ALL_FIXED = "all variance parameters are fixed"


def fit(
    V: Matrix,
    y: Tensor,
    X: Tensor | None = None,
    *,
    method: str = "REML",
    start: Tensor | str = "auto",
    solver: str | Solver = "auto",
    direction: Direction | None = None,
    control: StepControl | None = None,
    tolerance: float = 1e-11,
    max_steps: int = 200,
    rank: str = "drop",
    x_names: Sequence[str] | None = None,
    verbose: bool = False,
    ranks: Ranks = ALONE,
) -> FitResult:
    r"""Fit y ~ N(Xβ, V(θ)) by restricted or full maximum likelihood; V holds the estimates afterwards.

    Args:
        V: Covariance of the observations, shape (n, n).
        y: Response, shape (n,).
        X: Design of the fixed effects, shape (n, p); a column of ones when left out.
        method: ``"REML"`` or ``"ML"``, in capitals or not.
        start: ``"data"``: from the least-squares residual variance; ``"current"``: V's own thetas; ``"auto"``: from the
            data if V's thetas are all at their raw default 0, else V's own; or raw thetas, shape (k,).
        solver: ``"auto"``, the name of a solver, or a solver.
        direction: Information matrix of the steps; average information by default.
        control: Step control; a trust region by default.
        tolerance: Newton decrement at which the fit has converged.
        max_steps: Largest number of accepted steps.
        rank: ``"drop"``: drop aliased columns of X with a warning; ``"error"``: refuse them.
        x_names: Names of the columns of X.
        verbose: Print the solver with its expected cost, and a line for each step.
        ranks: The processes that share the rows, each of which calls this with V, y and X of its own ones. They also
            ask the result together, or call its ``settle`` before one of them does.

    Warns:
        UserWarning: The fit did not converge; the message says why.

    Raises:
        ValueError: The data or the model cannot be fitted; the message says why.
        ConfoundedParameters: The data cannot tell some variance parameters apart.
    """
    began = time.perf_counter()
    if max_steps < 0:
        raise ValueError(f"`max_steps` must be 0 or more, got {max_steps}.")
    direction = direction or Average()
    objective = objective_of(method, V, solver, direction, ranks)
    say_conversion(y=y, X=X)
    tell = partial(print, flush=True) if verbose and ranks.rank == 0 else None
    if tell is not None:
        tell(f"solver {objective.solver.name}: {objective.choice.cost}")
    y = y.detach() if isinstance(y, Tensor) else y  # only θ is moved
    X = X.detach() if isinstance(X, Tensor) else X
    problem = objective.prepare(y, X, rank=rank, ranks=ranks)
    names = column_names(problem, X, x_names)
    warn_of_aliased(problem, names)
    if objective.method == "REML":
        require_estimable(problem)
    before = V.theta.detach().clone()
    V.set_theta(ranks.first(start_theta(problem, start)))
    try:
        evaluation, history, information = maximise(objective, problem, direction, control, tolerance, max_steps, tell)
    except BaseException:
        V.set_theta(before)
        raise
    finally:
        V.zero_grad()
    result = build_result(objective, evaluation, history, names, time.perf_counter() - began, information)
    if history and not result.converged and ranks.rank == 0:
        warnings.warn(f"The fit did not converge: {result.reason}.", stacklevel=2)
    return result


def objective_of(method: str, V: Matrix, solver: str | Solver, direction: Direction, ranks: Ranks) -> Objective:
    """The objective of a method, with a solver that gives the derivatives that the direction needs.

    Raises:
        ValueError: The method is neither REML nor ML, or the solver cannot take V.
    """
    kind = OBJECTIVES.get(str(method).upper())
    if kind is None:
        raise ValueError(f"`method` must be 'REML' or 'ML', got {method!r}.")
    if direction.second_derivatives and solver == "auto":
        solver = "dense" if ranks.size == 1 and SOLVERS["blocks"]().refusal(V) is not None else "blocks"
    return kind(V, solver, ranks)


def maximise(
    objective: Objective,
    problem: Problem,
    direction: Direction,
    control: StepControl | None,
    tolerance: float,
    max_steps: int,
    tell: Callable[[Progress], Any] | None = None,
) -> tuple[Evaluation, list[Progress], np.ndarray | None]:
    """Move the thetas of V, from where they are, to a maximum of ℓ or for a number of steps.

    Arguments are those of `fit`; ``tell`` is called after each step.

    Returns:
        (the evaluation at the last thetas, progress after each step, average information of the free thetas there
        where the steps have made it); no step is made where all thetas are fixed.
    """
    V, ranks, history = problem.V, problem.ranks, list[Progress]()
    parameters = V.theta_parameters()
    current: list[Evaluation] = []  # the last evaluation, freed before the next is made

    def closure() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        current.clear()
        current.append(problem.evaluate())
        loss = ranks.same_loss(-objective.loglik(current[0]))
        loss.backward()
        ranks.same_gradients(parameters)
        return loss

    if V.free_index:
        optimizer = AverageInformation(
            parameters,
            information=lambda: ranks.first(direction.information(objective, current[0])),
            geometry=lambda: Geometry.of(V),
            control=control,
            tolerance=tolerance,
        )
        with problem.threads():
            while len(history) < max_steps and not (history and history[-1].done):
                optimizer.step(closure)
                history.append(optimizer.progress)
                if tell is not None:
                    tell(history[-1])
    if not (current and torch.equal(current[0].theta, V.theta.to(current[0].theta))):  # no step, or one was rejected
        current.clear()
        with torch.no_grad():
            current.append(problem.evaluate(V.theta.detach()))
    known = optimizer.information if history and isinstance(direction, Average) else None
    return current.pop(), history, known


def say_conversion(**given: Tensor | None) -> None:
    """Say which tensors are not float64; the likelihood is computed in float64."""
    for name, values in given.items():
        if isinstance(values, Tensor) and values.dtype != torch.float64:
            log.warning("%s is %s and was converted to float64.", name, str(values.dtype).removeprefix("torch."))


def start_theta(problem: Problem, start: Tensor | str) -> Tensor:
    """Raw thetas to start from; the choices are those of `fit`."""
    V = problem.V
    if isinstance(start, Tensor):
        V.check_params(start)
        return start
    if start not in ("auto", "data", "current"):
        raise ValueError(f"`start` must be 'auto', 'data', 'current' or raw thetas, got {start!r}.")
    theta = V.theta.detach()
    untouched = not bool(theta[V.free_index].any())
    return data_start(problem) if start == "data" or (start == "auto" and untouched) else theta


def build_result(
    objective: Objective,
    evaluation: Evaluation,
    history: list[Progress],
    x_names: list[str],
    seconds: float = math.nan,
    information: np.ndarray | None = None,
    sharing: str = "",
) -> FitResult:
    """The result of an optimiser that has stopped; the history is empty where no parameter was moved.

    The average information of the free thetas is computed at the evaluation where it is not given.
    """
    V = evaluation.problem.V
    free = V.free_index
    held = np.zeros(V.num_params, dtype=int)
    theta_cov = np.full((V.num_params, V.num_params), math.nan)
    converged, reason = (False, "no step was made") if free else (True, ALL_FIXED)
    if free:
        held[free] = history[-1].held if history else 0
        known = average_information(evaluation).cpu().numpy() if information is None else information
        theta_cov = theta_covariance(V, held, known)
    if history:
        last = history[-1]
        limit = f"the limit of {last.iteration} step{'s' * (last.iteration != 1)} was reached"
        converged, reason = last.converged, last.reason or limit
    return FitResult(
        objective, evaluation.detached(), converged, reason, history, theta_cov, tuple(held.tolist()),
        tuple(V.no_grad_index), x_names, seconds, sharing,
    )  # fmt: skip


def theta_covariance(V: Matrix, held: np.ndarray, information: np.ndarray) -> np.ndarray:
    """Covariance of the raw thetas, shape (k, k); NaN for those that are fixed, on a boundary, or without information.

    Args:
        V: Covariance of the observations.
        held: For each raw theta whether it is on a boundary, shape (k,).
        information: Information of the free ones.
    """
    free = np.array(V.free_index, dtype=int)
    use = (held[free] == 0) & (information.diagonal() > 0)
    inner, H = free[use], information[np.ix_(use, use)]
    unit = np.sqrt(np.outer(H.diagonal(), H.diagonal()))  # pinv takes as zero what is small beside the largest
    full = np.full((V.num_params, V.num_params), math.nan)
    full[np.ix_(inner, inner)] = np.linalg.pinv(H / unit, hermitian=True) / unit
    return full


def column_names(problem: Problem, X: Tensor | None, x_names: Sequence[str] | None) -> list[str]:
    """Names of the columns of X; ``x0``, ``x1``, … where none are given."""
    count = 1 if X is None else X.shape[1]
    if x_names is None:
        return ["Intercept"] if X is None else [f"x{i}" for i in range(count)]
    if len(x_names) != count:
        raise ValueError(f"`x_names` needs {count} names, got {len(x_names)}.")
    return list(x_names)


def warn_of_aliased(problem: Problem, names: Sequence[str]) -> None:
    """Warn of the columns of X that were dropped, on the first process."""
    if problem.fixed.aliased and problem.ranks.rank == 0:
        dropped = ", ".join(names[i] for i in problem.fixed.aliased)
        warnings.warn(f"X is rank deficient; dropped, from left to right: {dropped}.", stacklevel=3)
