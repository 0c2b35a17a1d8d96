"""A mixed model as a LightningModule: a shell around an objective, a solver and an optimiser, without mathematics.

One batch is the whole data set and one epoch is one step, so that callbacks, loggers and checkpoints see each step.

On several processes (``strategy="ddp"``) a batch is a process's rows, or all of them where the solver needs them
together. Loss, gradient and information of a step are those of all rows, the same on each process; there is nothing
left that `DistributedDataParallel` could average, and its own messages are left out.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss
from torch.optim import Optimizer
from torchmetrics.functional import mean_squared_error

from openreml_nn.covariance import Matrix, Sum
from openreml_nn.fit import (
    ALL_FIXED,
    OBJECTIVES,
    build_result,
    column_names,
    start_theta,
    theta_covariance,
    warn_of_aliased,
)
from openreml_nn.lightning.batches import Batch, NewRowsBatch
from openreml_nn.objectives import Objective
from openreml_nn.optim import (
    Average,
    AverageInformation,
    Direction,
    Geometry,
    Progress,
    StepControl,
    newton_decrement,
    require_estimable,
)
from openreml_nn.optim.host import to_host
from openreml_nn.result import FitResult, natural_scale
from openreml_nn.solvers import ALONE, Evaluation, Problem, Ranks, Solver, processes

SECOND_ORDER, FIRST_ORDER = 1e-12, 1e-8  # Newton decrements at which a fit has converged
_STATE = "openreml_nn"


class REMLModule(L.LightningModule):
    r"""Fits y ~ N(Xβ, V(θ)) by restricted or full maximum likelihood; the loss is −ℓ(θ), with its constants.

    Args:
        covariance: Covariance V of the observations, shape (n, n).
        objective: ``"REML"`` or ``"ML"``, in capitals or not, or a class of objectives.
        solver: ``"auto"``, the name of a solver, or a solver.
        direction: Information matrix of the steps; average information by default.
        control: Step control of `AverageInformation`; a trust region by default.
        tolerance: Newton decrement at which the fit has converged; 1e-12, or 1e-8 with another optimizer.
        start: Where a fit starts: ``"data"``: from the least-squares residual variance; ``"current"``: at V's own
            thetas; ``"auto"``: from the data if V's thetas are all at their raw default 0, else V's own; or raw thetas.
        optimizer: Makes another optimizer from the parameters that are not fixed, such as ``torch.optim.LBFGS``.
        rank: ``"drop"``: drop aliased columns of X with a warning; ``"error"``: refuse them.

    Attributes:
        history: Progress after each step.

    Example:
        >>> from openreml_nn.lightning import MixedModelDataModule, REMLModule
        >>> data = MixedModelDataModule("john_alpha", "yield ~ rep", ["gen", "rep:block"])
        >>> module = REMLModule(data.covariance, objective="ML")
    """

    def __init__(
        self,
        covariance: Matrix,
        objective: type[Objective] | str = "REML",
        solver: str | Solver = "auto",
        direction: Direction | None = None,
        control: StepControl | None = None,
        tolerance: float | None = None,
        start: Literal["auto", "data", "current"] | list[float] | Tensor = "auto",
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        rank: Literal["drop", "error"] = "drop",
    ) -> None:
        super().__init__()
        objective = objective.upper() if isinstance(objective, str) else objective
        plain = {"objective": objective, "solver": solver, "tolerance": tolerance, "start": start, "rank": rank}
        names = [name for name, value in plain.items() if isinstance(value, (str, float, int))]
        self.save_hyperparameters(*names, logger=False)
        if isinstance(objective, str) and objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be 'REML', 'ML' or a class of objectives, got {objective!r}.")
        kind = OBJECTIVES[objective] if isinstance(objective, str) else objective
        self.objective = kind(covariance, solver)
        self.direction, self.control = direction or Average(), control
        self.tolerance = tolerance or (SECOND_ORDER if optimizer is None else FIRST_ORDER)
        self.start = torch.tensor(start, dtype=torch.float64) if isinstance(start, (list, tuple)) else start
        self.make_optimizer, self.rank, self.asked_solver = optimizer, rank, solver
        self.history: list[Progress] = []
        self._fitted: Batch | None = None
        self._digests: dict[str, str] = {}
        self._idle = False
        self._problem: Problem | None = None
        self._x_names: list[str] = []
        self._evaluation: Evaluation | None = None
        self._theta, self._information = covariance.theta.detach(), np.zeros((0, 0))
        self._resumed: dict[str, Any] = {}
        self._trials, self._began, self._seconds = 0, math.nan, 0.0
        self._world: Ranks = ALONE
        self._result: tuple[Tensor, int, FitResult] | None = None

    # ---- what a caller reads -----------------------------------------------------------------------------------------

    @property
    def covariance(self) -> Matrix:
        """V, the covariance of the observations."""
        return self.objective.V

    @property
    def progress(self) -> Progress | None:
        """Where the fit stands after its last step."""
        return self.history[-1] if self.history else None

    @property
    def ended(self) -> str:
        """Why the fit has ended; empty while it goes on."""
        if self.progress is not None:
            return self.progress.reason if self.progress.done else ""
        return "" if self.covariance.free_index else ALL_FIXED

    @property
    def converged(self) -> bool:
        """Whether the fit has ended at a maximum."""
        return bool(self.ended) if self.progress is None else self.progress.converged

    @property
    def idle(self) -> bool:
        """Whether the Trainer's last fit made no step, as from a checkpoint that has reached its `max_epochs`."""
        return self._idle

    def result(self) -> FitResult:
        """The fit at the present thetas, the same object that `openreml_nn.fit` gives.

        Where several processes share the rows, all of them call this, and its tables are whole on the first one; after
        `Trainer.fit` with `ResultFiles` it is there, and one process may call it alone.

        Raises:
            ValueError: The module has seen no data.
        """
        self._join_data()
        at = (self.covariance.theta.detach(), len(self.history))
        if self._result is not None and self._result[1] == at[1] and torch.equal(self._result[0], at[0]):
            return self._result[2]
        if self._problem is None:
            loader = self._trainer.train_dataloader if self._idle and self._trainer is not None else None
            if loader is None:
                raise ValueError("`REMLModule.result` needs data. Call it after `Trainer.fit`.")
            self._begin(Batch.of(next(iter(loader))))
        assert self._problem is not None
        with torch.inference_mode(False), torch.no_grad():
            theta, evaluation = self.covariance.theta.detach(), self._evaluation
            if evaluation is None or not torch.equal(evaluation.theta, theta):
                evaluation = self._evaluation = self._problem.evaluate(theta)
            self._problem.V.set_theta(theta)  # one of this process's rows has its own parameters
            sharing = "" if self._fitted is None else self._fitted.sharing
            result = build_result(
                self.objective, evaluation, self.history, self._x_names, self._seconds, sharing=sharing
            )
            result.settle()
        self._result = (theta, len(self.history), result) if self._world.size > 1 else None
        return result

    def _join_data(self) -> None:
        """Lightning takes a module to the CPU when a fit ends; V belongs where the data have stayed."""
        if self._problem is not None and self.covariance.theta.device != self._problem.fixed.e.device:
            self.covariance.to(self._problem.fixed.e.device)

    def last_complete_step(self) -> None:
        """Take back a step that was cut off: the thetas are those after the last one in ``history``."""
        self.covariance.set_theta(self._theta)

    def natural_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimates and standard errors of the variance parameters after the last step, as ``natural_names`` are."""
        self._join_data()
        V, k = self.covariance, self.covariance.num_params
        held, free = np.zeros(k, dtype=int), V.free_index
        if self.progress is None:
            return V.natural(V.theta.detach()).cpu().numpy(), np.full(len(V.natural_names), math.nan)
        held[free] = self.progress.held
        return natural_scale(V, self._theta, theta_covariance(V, held, self._information), held.tolist())[:2]

    # ---- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        V = self.covariance
        if self.make_optimizer is not None and V.free_index:
            return self.make_optimizer([p for p in V.theta_parameters() if p.requires_grad])
        return AverageInformation(
            V.theta_parameters(),
            information=self._current_information,
            geometry=lambda: Geometry.of(V),
            control=self.control,
            tolerance=self.tolerance,
        )

    def setup(self, stage: str) -> None:
        self._world, self._result = processes(), None
        if self._world.size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            kind = type(self.trainer.strategy).__name__
            raise ValueError(f"`REMLModule` on several processes needs the Trainer's strategy 'ddp', got {kind}.")
        if self._world.size > 1 and stage == "fit" and not self.covariance.free_index:
            raise ValueError(f"On several processes there is nothing to fit: {ALL_FIXED}. Take one process.")

    def on_fit_start(self) -> None:
        self._fitted = self._problem = self._evaluation = self._result = None
        self._began, self._idle = time.perf_counter(), True

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            self.history, self._resumed, self._seconds = [], {}, 0.0
        self._began -= self._seconds

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._idle = False
        self._begin(Batch.of(batch))

    def _begin(self, batch: Batch) -> None:
        if self._prepare(batch) and self.trainer.global_step == 0:
            assert self._problem is not None
            self.covariance.set_theta(self._world.first(start_theta(self._problem, self.start)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self._problem is not None
        self._evaluation = None  # freed before the next one is made
        self._evaluation = self._problem.evaluate(self.covariance.theta)
        self._trials += 1
        return self._world.same_loss(-self.objective.loglik(self._evaluation))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:
            loss.backward(*args, **kwargs)
            self._world.same_gradients(self.covariance.theta_parameters())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            self._step(epoch, batch_idx, optimizer, optimizer_closure)
        self._seconds = time.perf_counter() - self._began

    def _step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.ended:  # nothing is free, or it goes on from the checkpoint of the last step
            optimizer_closure()
        elif isinstance(inner, AverageInformation):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.history.append(self._own(inner))
        else:
            before, self._trials = self.covariance.theta.detach(), 0
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.history.append(self._foreign(before))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give callbacks what they may monitor, as ``self.log`` would at a millisecond for each step."""
        if self.progress is not None:
            names = ("loglik", "score_norm", "decrement")
            values = {name: torch.tensor(getattr(self.progress, name), dtype=torch.float64) for name in names}
            self.trainer.callback_metrics.update(values)

    def _own(self, optimizer: AverageInformation) -> Progress:
        """Progress of `AverageInformation`, which knows it."""
        self._theta, self._information = self.covariance.theta.detach(), optimizer.information
        return optimizer.progress

    def _foreign(self, before: Tensor) -> Progress:
        """Progress of another optimizer: at the thetas that it evaluated last, before it moved them.

        Where the score is zero there, the step is taken back, so that the fit ends where it was found to.
        """
        V, evaluation = self.covariance, self._evaluation
        assert evaluation is not None
        self._theta = evaluation.theta.detach()
        free = [p for p in V.theta_parameters() if p.requires_grad]
        gradient = torch.cat([p.grad if p.grad is not None else torch.zeros_like(p) for p in free])
        steps = torch.stack([V.theta, self._theta]) - before
        loglik, g, H, moved = to_host(self.objective.loglik(evaluation), -gradient, self._current_information(), steps)
        self._information, decrement = H, newton_decrement(H, g)
        done = decrement <= self.tolerance
        if done:
            V.set_theta(self._theta)
        return Progress(
            iteration=len(self.history) + 1,
            loglik=float(loglik),
            score_norm=float(np.linalg.norm(g)),
            decrement=decrement,
            step_norm=float(np.linalg.norm(moved[int(done)])),
            step_length=math.nan,
            trials=self._trials,
            condition=float(np.linalg.cond(H)),
            held=(0,) * len(g),
            done=done,
            converged=done,
            reason="the score is zero" if done else "",
        )

    def _current_information(self) -> Tensor:
        assert self._evaluation is not None
        return self._world.first(self.direction.information(self.objective, self._evaluation))

    # ---- the data ----------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> bool:
        """Prepare the problem of a batch; False if it is the one that is there already."""
        if self._fitted is not None and self._fitted.same_as(batch):
            return False
        if self._fitted is not None and self.trainer.training:
            raise ValueError(
                "`REMLModule` got a second batch with other data. A mixed model is fitted to all records at once: "
                "use `MixedModelDataModule`, or a DataLoader with batch_size=None over a list of one pair (y, X)."
            )
        self._evaluation = self._result = None
        self._digests = {}
        self._check_resumed(batch)
        self._require_known_sharing(batch)
        if batch.choice is not None:
            self.objective.choice = batch.choice
        V, solver = self._covariance_of(batch), self.objective.solver
        self._problem = solver.prepare_shared(V, batch.y, batch.X, batch.ranks, rank=self.rank)
        self._x_names = column_names(self._problem, batch.X, batch.x_names)
        warn_of_aliased(self._problem, self._x_names)
        if self.objective.method == "REML":
            require_estimable(self._problem)
        self._fitted = batch
        return True

    def _covariance_of(self, batch: Batch) -> Matrix:
        """V of the records of a batch, at the thetas of the module and with the same ones fixed."""
        V = self.covariance
        if batch.V is None:
            return V
        if batch.V.param_names != V.param_names:
            raise ValueError(
                f"The batch has a V with the parameters {batch.V.param_names}, and the module's has {V.param_names}. "
                f"Make both from one model."
            )
        batch.V.set_theta(V.theta.detach())
        batch.V.set_no_grad(index=V.no_grad_index)
        return batch.V

    def _require_known_sharing(self, batch: Batch) -> None:
        """Raise a ValueError on all processes where they have different records and the batch does not say so."""
        if self._world.size == 1 or batch.ranks.size > 1:
            return
        prints = self._world.objects(fingerprint(batch, self.covariance))
        other = next((place for place, own in enumerate(prints) if own != prints[0]), None)
        if other is not None:
            raise ValueError(
                f"Process {other + 1} of {self._world.size} has other data than process 1: "
                f"{difference(prints[0], prints[other])}. Use `MixedModelDataModule`, or a `Batch` with `V`, of the "
                f"rows of a process, and `ranks`."
            )

    def _check_resumed(self, batch: Batch) -> None:
        """Raise a ValueError where the data are not those of the fit in the checkpoint."""
        before = self._resumed.get("data")
        if not before:
            return
        self._digests = fingerprint(batch, self.covariance)
        if before != self._digests:
            raise ValueError(
                f"The checkpoint is of a fit to other data: {difference(before, self._digests)}. A fit goes on from "
                f"its own table, and BLUEs and BLUPs are recomputed from it. Give the table of the fit; rows to "
                f"predict or to validate on are a table of their own."
            )

    # ---- validation and prediction -----------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._prepare(Batch.of(batch))
            theta = self.covariance.theta.detach().requires_grad_()
            loglik = self.objective.loglik(self._problem.evaluate(theta))  # type: ignore[union-attr]
            (score,) = torch.autograd.grad(loglik, theta)
        free = self.covariance.free_index
        values = {"val/loglik": loglik.detach(), "val/score_norm": score[free].norm()}
        if isinstance(batch, NewRowsBatch) and batch.y is not None:
            values |= self._errors(batch.y, batch)
        self.log_dict(values, batch_size=1, sync_dist=self._world.size > 1)

    def _errors(self, y: Tensor, batch: NewRowsBatch) -> dict[str, Tensor]:
        """Error of predictions, and their negative log density where the residual variance of a new row is known."""
        result = self.result()
        predicted = torch.tensor(result.predict(batch.X, batch.Z, batch.unseen).to_numpy()).to(y)
        mean, variance, residual = predicted[:, 0], predicted[:, 1].square(), result.variance_beside(batch.Z)
        values = {"val/rmse": mean_squared_error(mean, y, squared=False)}
        most, minus_least = batch.fitted.ranks.largest(torch.stack([residual.max(), -residual.min()]))
        if torch.allclose(most, -minus_least):
            values["val/nlpd"] = gaussian_nll_loss(mean, y, variance + most, full=True, eps=0.0)
        return values

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Predictions for new rows: their table with ``new_levels``, ``prediction`` and ``std_error`` of Xβ + Zu."""
        if not isinstance(batch, NewRowsBatch):
            raise TypeError("`REMLModule` predicts new rows: give `MixedModelDataModule` a `predict_table`.")
        with torch.inference_mode(False), torch.no_grad():
            self._prepare(batch.fitted)
            predicted = self.result().predict(batch.X, batch.Z, batch.unseen)
        return pd.concat([batch.table, predicted.set_axis(batch.table.index)], axis=1)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._fitted is not None and not self._digests:
            self._digests = fingerprint(self._fitted, self.covariance)
        checkpoint[_STATE] = {
            "parameters": self.covariance.natural_names,
            "history": [vars(progress) for progress in self.history],
            "seconds": self._seconds,
            "data": self._digests or self._resumed.get("data"),
            "optimizer": self._optimizer_name(),
        }

    def _optimizer_name(self) -> str | None:
        """Class of the optimizer of the Trainer's fit; None where there is no fit."""
        optimizers = self._trainer.optimizers if self._trainer is not None else []
        return type(getattr(optimizers[0], "optimizer", optimizers[0])).__name__ if optimizers else None

    def _check_optimizer(self, before: str | None) -> None:
        """Raise a ValueError where a fit is to go on by another optimizer, whose state is not in the checkpoint."""
        trainer = self._trainer
        if before is None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        now = type(self.configure_optimizers()).__name__
        if now != before:
            raise ValueError(
                f"The checkpoint is of a fit by {before}, this one is by {now}. Go on with the same optimizer, or "
                f"start a new fit without the checkpoint."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._fitted = self._problem = self._evaluation = None
        self._resumed = checkpoint.get(_STATE, {})
        before, names = self._resumed.get("parameters"), self.covariance.natural_names
        if before not in (None, names):
            raise ValueError(f"The checkpoint is of another model: it has the parameters {before}, this one {names}.")
        self._check_optimizer(self._resumed.get("optimizer"))
        self.history = [Progress(**progress) for progress in self._resumed.get("history", [])]
        self._seconds = self._resumed.get("seconds", 0.0)


def fingerprint(batch: Batch, V: Matrix) -> dict[str, str]:
    """What a fit depends on: the number of rows, and digests of y, of X, and of the numbers in each term of V."""
    terms = dict(zip(V.operand_names, V.operand_list(), strict=True)) if isinstance(V, Sum) else {"V": V}
    if batch.whole is None and batch.ranks.size > 1:  # in the order of the processes
        own = [str(len(batch.y)), _digest([batch.y]), _digest([] if batch.X is None else [batch.X])]
        rows, y, X = (" + ".join(parts) for parts in zip(*batch.ranks.objects(own), strict=True))
        return {"number of rows": rows, "the response": y, "the fixed effects": X}
    batch = batch.whole or batch
    return {
        "number of rows": str(len(batch.y)),
        "the response": _digest([batch.y]),
        "the fixed effects": _digest([] if batch.X is None else [batch.X]),
    } | {f"the term {name!r}": _digest(term.buffers()) for name, term in terms.items()}


def difference(before: dict[str, str], now: dict[str, str]) -> str:
    """In what two fingerprints differ, in words."""
    rows = [data.get("number of rows") for data in (before, now)]
    if rows[0] != rows[1]:
        return f"it had {rows[0]} rows, this table has {rows[1]}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return f"{' and '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


def _digest(values: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        array = value.detach().cpu().contiguous()
        digest.update((array.double() if array.is_floating_point() else array).numpy().tobytes())
    return digest.hexdigest()
