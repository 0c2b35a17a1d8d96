"""Kill -9 at a random moment, resume, and compare with the fit that was left alone: the same bits, every time.

For each of the kills a process fits a model with a checkpoint of every step; it is killed at a random moment between
the start of its training and the time that a whole training takes, the writing of results included. What it left is
looked at: the checkpoint loads or is not there, and so with each file of results. Another process then goes on from the
checkpoint to the end. Its ℓ, thetas, history, the memory of its optimiser, and the random numbers that come next must
equal those of the uninterrupted fit bit by bit.

The models take turns: the second-order optimiser with its trust region, Adam, and LBFGS, each from a start away from
the optimum of a lattice of 576 rows by the dense solver, so that there are steps enough to be killed in.

    python scripts/check_kill_resume.py --kills 20 --seed 1

Exit code 0 if all are identical.
"""

import argparse
import functools
import json
import logging
import math
import multiprocessing
import pickle
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from openreml_nn.lightning import (
    ConvergenceCallback,
    MixedModelDataModule,
    RandomState,
    REMLModule,
    ResultFiles,
    SafeCheckpointIO,
)
from openreml_nn.report import FILES

ROWS = 576
START = [0.5, -2.0, 0.5]  # raw thetas, away from the optimum
MODELS: dict[str, dict[str, Any]] = {
    "average information": {},
    "Adam": {"optimizer": functools.partial(torch.optim.Adam, lr=0.1), "tolerance": 1e-4},
    "LBFGS": {
        "optimizer": functools.partial(torch.optim.LBFGS, max_iter=1, line_search_fn="strong_wolfe"),
        "tolerance": 1e-10,
    },
}


class Say(Callback):
    """Tells the parent that training begins, or that a checkpoint of the last step leaves nothing to train."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.said = pipe, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._say()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._say()

    def _say(self) -> None:
        if not self.said:
            self.pipe.send("training")
        self.said = True


def lattice() -> pd.DataFrame:
    """Yields of 192 genotypes in 3 replicates of 48 blocks."""
    rng = np.random.default_rng(7)
    rep, gen = np.repeat(np.arange(3), ROWS // 3), np.tile(np.arange(ROWS // 3), 3)
    block = (gen + rep * (gen // 48)) % 48
    effects = rng.normal(0.0, 0.4, ROWS // 3)[gen] + rng.normal(0.0, 0.3, (3, 48))[rep, block]
    y = 4.0 + effects + rng.normal(0.0, 0.3, ROWS)
    return pd.DataFrame({"y": y, "rep": rep.astype(str), "gen": gen.astype(str), "block": block.astype(str)})


def train(model: str, folder: Path, pipe: Connection) -> None:
    """Fit in a process of its own, from the checkpoint in the folder where there is one; sends what it ended with."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    data = MixedModelDataModule(lattice(), "y ~ rep", ["gen", "rep:block"])
    module = REMLModule(data.covariance, solver="dense", start=START, **MODELS[model])
    keep = ModelCheckpoint(folder, "last", enable_version_counter=False)
    files = ResultFiles(folder, verbose=False)
    trainer = L.Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ConvergenceCallback(), files, RandomState(), keep, Say(pipe)], plugins=[SafeCheckpointIO()],
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    optimizer = trainer.optimizers[0].state_dict()["state"]
    ended = {
        "loglik": module.result().loglik,
        "theta": module.covariance.theta.detach(),
        "history": [vars(progress) for progress in module.history],
        "optimizer": optimizer,
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    }
    pipe.send(pickle.dumps(ended))  # whole, where tensors by themselves would stay in this process


def same(a: Any, b: Any) -> bool:
    """Whether two values have the same bits."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool(torch.as_tensor(a).equal(torch.as_tensor(b)))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


class Runner:
    """Fits in processes that have imported everything before they start."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["check_kill_resume"])

    def start(self, model: str, folder: Path) -> tuple[Any, Connection]:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=train, args=(model, folder, theirs))
        process.start()
        theirs.close()
        mine.recv()  # training has begun
        return process, mine

    def finish(self, model: str, folder: Path) -> tuple[dict[str, Any], float]:
        """Fit to the end: what it ended with, and the seconds of training."""
        process, pipe = self.start(model, folder)
        began = time.perf_counter()
        result = pickle.loads(pipe.recv())
        seconds = time.perf_counter() - began
        process.join()
        return result, seconds


def whole_or_absent(folder: Path) -> str:
    """What a killed process left: '' if every file there is whole, else what is wrong."""
    last = folder / "last.ckpt"
    readers: dict[str, Callable[[Path], Any]] = {name: pd.read_csv for name in FILES if name.endswith(".csv")}
    readers |= {"last.ckpt": SafeCheckpointIO().load_checkpoint, "fit.json": lambda path: json.loads(path.read_text())}
    for name, read in readers.items():
        try:
            if (folder / name).exists():
                read(folder / name)
        except Exception as error:
            return f"{name} is damaged: {error}"
    if (folder / "fit.json").exists() and not last.exists():
        return "there are results and no checkpoint"
    return ""


def main() -> int:
    """Kill, resume, compare; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dice, runner, good = random.Random(options.seed), Runner(), 0
    with tempfile.TemporaryDirectory() as scratch:
        alone = {}
        for model in MODELS:
            folder = Path(scratch, model)
            runner.finish(model, folder / "warm")
            alone[model] = runner.finish(model, folder)
            print(f"{model}: {len(alone[model][0]['history'])} steps, {alone[model][1]:.2f} s", flush=True)
        print(f"\n{'kill':>4}  {'model':20} {'killed after':>12}  {'steps kept':>10}  result")
        for kill in range(options.kills):
            model = list(MODELS)[kill % len(MODELS)]
            expected, seconds = alone[model]
            folder, killed = Path(scratch, f"kill{kill}"), False
            while not killed:  # a process that was through before its time is no kill
                folder = folder.with_name(folder.name + "_")
                folder.mkdir()
                process, _ = runner.start(model, folder)
                moment = dice.uniform(0.0, seconds)
                time.sleep(moment)
                process.kill()
                process.join()
                killed = process.exitcode == -signal.SIGKILL
            damage = whole_or_absent(folder)
            kept = SafeCheckpointIO().load_checkpoint(folder / "last.ckpt") if (folder / "last.ckpt").exists() else {}
            result = damage or compare(expected, runner.finish(model, folder)[0])
            good += result == "identical"
            print(f"{kill + 1:4d}  {model:20} {moment:10.3f} s  {kept.get('global_step', 0):10d}  {result}", flush=True)
    print(f"\n{options.kills} kills, {good} identical results")
    return 0 if good == options.kills else 1


def compare(expected: dict[str, Any], result: dict[str, Any]) -> str:
    """'identical', or what differs."""
    differ = [name for name in expected if not same(expected[name], result[name])]
    return f"differs in {', '.join(differ)}" if differ else "identical"


if __name__ == "__main__":
    sys.exit(main())
