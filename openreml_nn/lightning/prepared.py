"""A batch of a `REMLModule` with all that depends on its data: the problem, and the evaluation that was made last."""

from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.fit import build_result, column_names, warn_of_aliased
from openreml_nn.lightning.batches import Batch
from openreml_nn.lightning.fingerprints import fingerprint, require_known_sharing, require_same_data
from openreml_nn.objectives import Objective
from openreml_nn.optim import Progress, require_estimable
from openreml_nn.result import FitResult
from openreml_nn.solvers import Evaluation, Ranks


class PreparedBatch:
    """A batch whose problem is prepared for an objective.

    Args:
        batch: The data.
        objective: The objective; it takes the solver of the batch, where the batch brings one.
        rank: ``"drop"``: drop aliased columns of X with a warning; ``"error"``: refuse them.
        ranks: All processes of the Trainer.
        before: Fingerprint of the data of a fit that goes on; empty where none does.

    Attributes:
        problem: The problem, with V at the thetas of the objective's.
        x_names: Names of the columns of X.
        evaluation: The evaluation that was made last; None where there is none.

    Raises:
        ValueError: The data are not those of the fit that goes on, processes have different data that they do not
            share, or V has other parameters than the objective's; or as ``Solver.prepare``.
        ConfoundedParameters: The fixed effects take up a random term whole.
    """

    _result: FitResult | None

    def __init__(
        self, batch: Batch, objective: Objective, rank: str, ranks: Ranks, before: dict[str, str] | None = None
    ) -> None:
        self.batch, self.objective = batch, objective
        if before:
            require_same_data(before, self.fingerprint)
        require_known_sharing(batch, objective.V, ranks)
        if batch.choice is not None:
            objective.choice = batch.choice
        V = covariance_of(batch, objective.V)
        self.problem = objective.solver.prepare_shared(V, batch.y, batch.X, batch.ranks, rank=rank)
        self.x_names = column_names(self.problem, batch.X, batch.x_names)
        warn_of_aliased(self.problem, self.x_names)
        if objective.method == "REML":
            require_estimable(self.problem)
        self.evaluation: Evaluation | None = None
        self._several, self._result = ranks.size > 1, None

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the fit depends on, as `openreml_nn.lightning.fingerprints.fingerprint` has it."""
        return fingerprint(self.batch, self.objective.V)

    def evaluate(self, theta: Tensor) -> Evaluation:
        """The problem evaluated at raw thetas, kept as ``evaluation``."""
        self.evaluation = None  # freed before the next one is made
        self.evaluation = self.problem.evaluate(theta)
        return self.evaluation

    def at(self, theta: Tensor) -> Evaluation:
        """The evaluation that was made last where it is at these raw thetas, else a new one."""
        if self.evaluation is None or not torch.equal(self.evaluation.theta, theta.to(self.evaluation.theta)):
            return self.evaluate(theta)
        return self.evaluation

    def result(self, history: list[Progress], seconds: float) -> FitResult:
        """The fit at the present thetas of the objective.

        Processes that share the rows call this together. It is then kept, so that one of them may ask again alone.

        Args:
            history: Progress after each step.
            seconds: Wall time of the fit.
        """
        theta, kept = self.objective.V.theta.detach(), self._result
        if kept is not None and len(kept.history) == len(history) and torch.equal(kept.theta, theta.to(kept.theta)):
            return kept
        self.problem.V.set_theta(theta)  # V of a process's rows has its own parameters
        sharing = self.batch.sharing
        result = build_result(self.objective, self.at(theta), list(history), self.x_names, seconds, sharing=sharing)
        result.settle()
        self._result = result if self._several else None
        return result


def covariance_of(batch: Batch, V: Matrix) -> Matrix:
    """V of the records of a batch, at the thetas of a module's V and with the same ones fixed.

    Raises:
        ValueError: The batch has a V with other parameters.
    """
    if batch.V is None:
        return V
    if batch.V.param_names != V.param_names:
        raise ValueError(
            f"The batch has a V with the parameters {batch.V.param_names}, and the module's has {V.param_names}. Make "
            f"both from one model."
        )
    batch.V.set_theta(V.theta.detach())
    batch.V.set_no_grad(index=V.no_grad_index)
    return batch.V
