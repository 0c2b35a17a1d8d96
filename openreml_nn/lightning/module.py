"""A mixed model as a LightningModule: a shell around an objective, a solver and an optimiser, without mathematics.

One batch is the whole data set and one epoch is one step, so that callbacks, loggers and checkpoints see each step.

On several processes (``strategy="ddp"``) a batch is a process's rows, or all of them where the solver needs them
together. Loss, gradient and information of a step are those of all rows, the same on each process; there is nothing
left that `DistributedDataParallel` could average, and its own messages are left out.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from openreml_nn.covariance import Matrix
from openreml_nn.fit import ALL_FIXED, OBJECTIVES, start_theta
from openreml_nn.lightning.batches import Batch, NewRowsBatch
from openreml_nn.lightning.course import Course
from openreml_nn.lightning.measure import measured_progress
from openreml_nn.lightning.new_rows import errors, predictions
from openreml_nn.lightning.prepared import PreparedBatch
from openreml_nn.lightning.records import FitRecord
from openreml_nn.objectives import Objective
from openreml_nn.optim import Average, AverageInformation, Direction, Geometry, Progress, StepControl
from openreml_nn.result import FitResult
from openreml_nn.solvers import ALONE, Problem, Ranks, Solver, processes

SECOND_ORDER, FIRST_ORDER = 1e-11, 1e-8  # Newton decrements at which a fit has converged


class REMLModule(L.LightningModule):
    r"""Fits y ~ N(Xβ, V(θ)) by restricted or full maximum likelihood; the loss is −ℓ(θ), with its constants.

    Args:
        covariance: Covariance V of the observations, shape (n, n).
        objective: ``"REML"`` or ``"ML"``, in capitals or not, or a class of objectives.
        solver: ``"auto"``, the name of a solver, or a solver.
        direction: Information matrix of the steps; average information by default.
        control: Step control of `AverageInformation`; a trust region by default.
        tolerance: Newton decrement at which the fit has converged; 1e-11, or 1e-8 with another optimizer.
        start: Where a fit starts: ``"data"``: from the least-squares residual variance; ``"current"``: at V's own
            thetas; ``"auto"``: from the data if V's thetas are all at their raw default 0, else V's own; or raw thetas.
        optimizer: Makes another optimizer from the parameters that are not fixed, such as ``torch.optim.LBFGS``.
        rank: ``"drop"``: drop aliased columns of X with a warning; ``"error"``: refuse them.

    Attributes:
        idle: Whether the Trainer's last fit made no step, as from a checkpoint that has reached its `max_epochs`.

    Raises:
        ValueError: The objective is unknown, or the solver cannot take the covariance.

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
        self._course = Course(covariance)
        self._prepared: PreparedBatch | None = None
        self.idle = False
        self._resumed = FitRecord()
        self._trials, self._began = 0, math.nan
        self._world: Ranks = ALONE

    # ---- what a caller reads -----------------------------------------------------------------------------------------

    @property
    def covariance(self) -> Matrix:
        """V, the covariance of the observations."""
        return self.objective.V

    @property
    def history(self) -> list[Progress]:
        """Progress after each step."""
        return self._course.history

    @property
    def progress(self) -> Progress | None:
        """How the fit stands after its last step."""
        return self._course.progress

    @property
    def ended(self) -> str:
        """Why the fit has ended; empty while it goes on."""
        return self._course.ended

    @property
    def converged(self) -> bool:
        """Whether the fit has ended at a maximum."""
        return self._course.converged

    @property
    def problem(self) -> Problem | None:
        """The prepared problem of the rows of this process; None before the module has seen data."""
        return None if self._prepared is None else self._prepared.problem

    def result(self) -> FitResult:
        """The fit at the present thetas, the same object that `openreml_nn.fit` gives.

        Where several processes share the rows, all of them call this, and its tables are whole on the first one; after
        `Trainer.fit` with `ResultFiles` it is there, and one process may call it alone.

        Raises:
            ValueError: The module has seen no data.
        """
        self._join_data()
        if self._prepared is None:
            loader = self._trainer.train_dataloader if self.idle and self._trainer is not None else None
            if loader is None:
                raise ValueError("`REMLModule.result` needs data. Call it after `Trainer.fit`.")
            self._begin(Batch.of(next(iter(loader))))
        with torch.inference_mode(False), torch.no_grad():
            return self._in_hand().result(self.history, self._course.seconds)

    def _in_hand(self) -> PreparedBatch:
        """The data that the module has seen last."""
        assert self._prepared is not None
        return self._prepared

    def _join_data(self) -> None:
        """Lightning takes a module to the CPU when a fit ends; V belongs where the data have stayed."""
        if self._prepared is not None and self.covariance.theta.device != self._prepared.batch.y.device:
            self.covariance.to(self._prepared.batch.y.device)

    def last_complete_step(self) -> None:
        """Take back a step that was cut off: the thetas are those after the last one in ``history``."""
        self._course.take_back()

    def natural_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimates and standard errors of the variance parameters after the last step, as ``natural_names`` are."""
        self._join_data()
        return self._course.natural_scale()

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
        """Find the processes of the fit.

        Raises:
            ValueError: There are several, and the Trainer's strategy is not 'ddp' or nothing is free.
        """
        self._world = processes()
        if self._world.size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            kind = type(self.trainer.strategy).__name__
            raise ValueError(f"`REMLModule` on several processes needs the Trainer's strategy 'ddp', got {kind}.")
        if self._world.size > 1 and stage == "fit" and not self.covariance.free_index:
            raise ValueError(f"On several processes there is nothing to fit: {ALL_FIXED}. Take one process.")

    def on_fit_start(self) -> None:
        self._prepared = None
        self._began, self.idle = time.perf_counter(), True

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            self._course, self._resumed = Course(self.covariance), FitRecord()
        self._course.stand(self.covariance.theta)  # a checkpoint has brought it
        self._began -= self._course.seconds

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.idle = False
        self._begin(Batch.of(batch))

    def _begin(self, batch: Batch) -> None:
        if self._prepare(batch) and self.trainer.global_step == 0:
            self.covariance.set_theta(self._world.first(start_theta(self._in_hand().problem, self.start)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._trials += 1
        return self._world.same_loss(-self.objective.loglik(self._in_hand().evaluate(self.covariance.theta)))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:
            loss.backward(*args, **kwargs)
            self._world.same_gradients(self.covariance.theta_parameters())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        strategy = self.trainer.strategy
        sync = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with sync, self._in_hand().problem.threads():
            self._step(epoch, batch_idx, optimizer, optimizer_closure)
        self._course.seconds = time.perf_counter() - self._began

    def _step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        inner = _inner(optimizer)
        if self.ended:  # nothing is free, or it goes on from the checkpoint of the last step
            optimizer_closure()
            if self.covariance.free_index:
                self._course.stand(self.covariance.theta, self._current_information().cpu().numpy())
        elif isinstance(inner, AverageInformation):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self._course.stand(self.covariance.theta, inner.information)
            self.history.append(inner.progress)
        else:
            before, self._trials = self.covariance.theta.detach(), 0
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self._measure(before)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give callbacks what they may monitor, as ``self.log`` would at a millisecond for each step."""
        if self.progress is not None:
            names = ("loglik", "score_norm", "decrement")
            values = {name: torch.tensor(getattr(self.progress, name), dtype=torch.float64) for name in names}
            self.trainer.callback_metrics.update(values)

    def _measure(self, before: Tensor) -> None:
        """Progress of an optimizer that does not tell it: at the thetas that it evaluated last, before it moved them.

        Where the score is zero there, the step is taken back, so that the fit ends where it was found to.
        """
        evaluation = self._in_hand().evaluation
        assert evaluation is not None
        progress, information = measured_progress(
            self.objective, evaluation, self._current_information(), before, self.tolerance, len(self.history) + 1,
            self._trials,
        )  # fmt: skip
        self._course.stand(evaluation.theta, information)
        if progress.done:
            self._course.take_back()
        self.history.append(progress)

    def _current_information(self) -> Tensor:
        evaluation = self._in_hand().evaluation
        assert evaluation is not None
        return self._world.first(self.direction.information(self.objective, evaluation))

    # ---- the data ----------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> bool:
        """Prepare the problem of a batch; False if it is the one that is there already.

        Raises:
            ValueError: In training there are other data already; or as `PreparedBatch`.
        """
        if self._prepared is not None and self._prepared.batch.same_as(batch):
            return False
        if self._prepared is not None and self.trainer.training:
            raise ValueError(
                "`REMLModule` got a second batch with other data. A mixed model is fitted to all records at once: "
                "use `MixedModelDataModule`, or a DataLoader with batch_size=None over a list of one pair (y, X)."
            )
        if self._prepared is not None:
            self._prepared.evaluation = None  # freed before the other problem is made
        self._prepared = PreparedBatch(batch, self.objective, self.rank, self._world, self._resumed.data)
        return True

    # ---- validation and prediction -----------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``fit/loglik`` and ``fit/score_norm``, of the rows of the fit, and errors of new rows as ``val/…``."""
        with torch.inference_mode(False), torch.enable_grad():
            self._prepare(Batch.of(batch))
            theta = self.covariance.theta.detach().requires_grad_()
            loglik = self.objective.loglik(self._in_hand().problem.evaluate(theta))
            (score,) = torch.autograd.grad(loglik, theta)
        free = self.covariance.free_index
        values = {"fit/loglik": loglik.detach(), "fit/score_norm": score[free].norm()}
        if isinstance(batch, NewRowsBatch) and batch.y is not None:
            values |= errors(self.result(), batch, batch.y)
        self.log_dict(values, batch_size=1, sync_dist=self._world.size > 1)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Predictions for new rows: their table with ``new_levels``, ``prediction`` and ``std_error`` of Xβ + Zu.

        Raises:
            TypeError: The batch has no new rows.
        """
        if not isinstance(batch, NewRowsBatch):
            raise TypeError("`REMLModule` predicts new rows: give `MixedModelDataModule` a `predict_table`.")
        with torch.inference_mode(False), torch.no_grad():
            self._prepare(batch.fitted)
            return predictions(self.result(), batch)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        optimizers = self._trainer.optimizers if self._trainer is not None else []
        FitRecord(
            parameters=self.covariance.natural_names,
            history=self.history,
            seconds=self._course.seconds,
            data=self._resumed.data if self._prepared is None else self._prepared.fingerprint,
            optimizer=type(_inner(optimizers[0])).__name__ if optimizers else None,
        ).write(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._prepared, self._resumed = None, FitRecord.of(checkpoint)
        self._resumed.require_parameters(self.covariance.natural_names)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._resumed.require_optimizer(type(self.configure_optimizers()).__name__)
        self._course = Course(self.covariance, self._resumed.history, self._resumed.seconds)


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer in what Lightning has put around it."""
    return getattr(optimizer, "optimizer", optimizer)
