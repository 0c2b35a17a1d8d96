"""What Lightning costs: milliseconds a step of a Trainer above those of the bare loop with the same optimiser.

The model is the alpha-lattice trial of 72 rows. A fit of it has 6 steps, so that a step's cost drowns in what a fit
costs once. Therefore each variant runs twice, with FEW and with MANY steps, and the difference is divided by
MANY - FEW. So that the optimiser goes on for so long, its state is put back before each step to what it was after the
first one, also in the bare loop; each step is then the second step of the fit: one trial point, with likelihood,
gradient and information. Times are medians over repetitions of the CPU time of the process, the writer thread of
TensorBoard included, so that other programs on the machine hardly count; torch has one thread.

Variants of the Trainer:
    bare Trainer      no logger, no checkpoints, no progress bar, no callbacks
    TensorBoard       the same with TensorBoardLogger, ConvergenceCallback and TensorBoardMonitor, each step logged
    all defaults      all this with Lightning's checkpoint of each epoch, progress bar and model summary

Budget: 2 ms a step with TensorBoard on, 5 ms with every default. What a fit costs once is not in it: the figures at its
end take some 0.1 s each, the first one also the import of matplotlib.

Result: 2 shared cores of an AMD EPYC, Python 3.11, torch 2.13, lightning 2.6, tensorboard 2.21, 21 repetitions.
    loop              4.91 ms a step
    bare Trainer      5.53 ms a step,  0.62 above the loop
    TensorBoard       6.54 ms a step,  1.63 above the loop
    all defaults      9.11 ms a step,  4.20 above the loop
Other runs gave 1.6 to 1.9 ms with TensorBoard and 4.2 to 4.8 ms with all defaults.
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from openreml_nn.covariance import Matrix
from openreml_nn.fit import start_theta
from openreml_nn.lightning import ConvergenceCallback, MixedModelDataModule, REMLModule, TensorBoardMonitor
from openreml_nn.likelihood import average_information
from openreml_nn.objectives import REML
from openreml_nn.optim import AverageInformation, Geometry

FEW, MANY = 10, 60


def memory(optimizer: AverageInformation) -> dict[str, Any]:
    """What the optimiser knows; empty before its first step."""
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


class BackToStart(Callback):
    """Puts thetas and optimiser back to where they were after the first step, so that a fit never ends."""

    def __init__(self) -> None:
        self.after_first: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step:
            put_back(module.covariance, trainer.optimizers[0], self.after_first)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = False


def put_back(V: Matrix, optimizer: Any, after_first: dict[str, Any]) -> None:
    """Keep what the optimiser knows after its first step, and give it back before each later one."""
    if not after_first:
        after_first.update(memory(optimizer))
    memory(optimizer).update(after_first)
    V.set_theta(after_first["theta"])


def data() -> MixedModelDataModule:
    return MixedModelDataModule("john_alpha", "yield ~ rep", ["gen", "rep:block"])


def bare_loop(steps: int) -> float:
    """CPU seconds of the loop of `openreml_nn.fit`, from prepared data."""
    model = data().model
    objective = REML(model.V)
    began = time.process_time()
    problem = objective.prepare(model.y, model.X)
    current: list[Any] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        current.clear()
        current.append(problem.evaluate())
        loss = -objective.loglik(current[0])
        loss.backward()
        return loss

    optimizer = AverageInformation(
        model.V.theta_parameters(),
        information=lambda: average_information(current[0]),
        geometry=lambda: Geometry.of(model.V),
    )
    history = []
    after_first: dict[str, Any] = {}
    model.V.set_theta(start_theta(problem, "auto"))
    for step in range(steps):
        if step:
            put_back(model.V, optimizer, after_first)
        optimizer.step(closure)
        history.append(optimizer.progress)
    return time.process_time() - began


def trainer_run(steps: int, variant: str) -> float:
    """CPU seconds of `Trainer.fit`."""
    datamodule = data()
    module = REMLModule(datamodule.covariance)
    callbacks: list[Callback] = [BackToStart()]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"logger": False}
        if variant != "bare Trainer":
            callbacks = [ConvergenceCallback(), TensorBoardMonitor(figures=False), BackToStart()]
            options["logger"] = TensorBoardLogger(folder, default_hp_metric=False)
        if variant != "all defaults":
            options |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=steps, accelerator="cpu", devices=1, log_every_n_steps=1, default_root_dir=folder,
            callbacks=callbacks, **options,
        )  # fmt: skip
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(module, datamodule)
        seconds = time.process_time() - began
    if trainer.global_step != steps:
        raise ValueError(f"The fit made {trainer.global_step} steps, {steps} were wanted.")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    variants = ("bare Trainer", "TensorBoard", "all defaults")
    names = ("loop", *variants)
    slopes: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repetitions + 1):  # the first turn warms up
        for name in names:
            run = bare_loop if name == "loop" else lambda steps, name=name: trainer_run(steps, name)
            slope = 1e3 * (run(MANY) - run(FEW)) / (MANY - FEW)
            if turn:
                slopes[name].append(slope)
    loop = statistics.median(slopes["loop"])
    print(f"loop            {loop:6.2f} ms a step")
    for name in variants:
        median = statistics.median(slopes[name])
        print(f"{name:15s} {median:6.2f} ms a step, {median - loop:5.2f} above the loop")


if __name__ == "__main__":
    main()
