"""What a fit does when something goes wrong: a row for each fault, with the exit code and the words that were printed.

Every case runs in processes of its own. It passes if the exit code is not 0, one line says what is wrong, every process
has ended within a minute (half a minute more is for its start), no file of results claims a success, and a checkpoint
or result that was there before is whole.

    python scripts/check_faults.py                # all
    python scripts/check_faults.py --only port    # those whose name has this word

Exit code 0 if all pass.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from openreml_nn.data import read_table
from openreml_nn.lightning import (
    ConvergenceCallback,
    MixedModelDataModule,
    REMLModule,
    ResultFiles,
    SafeCheckpointIO,
)

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "john_alpha.yaml"
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
MINUTE = 60.0


class Slow(Callback):
    """Makes a step take a while, so that there is time to disturb it."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(1.0)


class Dies(Callback):
    """Kills process 1 after its second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


# ---- what happens inside a process, for faults that no option of the command line makes ------------------------------


def rank() -> int:
    """Number of this process, before anything is set up."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def fit_on_two(table: pd.DataFrame, **options: Any) -> None:
    """A fit by two processes."""
    data = MixedModelDataModule(table, "yield ~ rep", ["gen", "rep:block"])
    trainer = L.Trainer(
        devices=2, strategy="ddp", accelerator="cpu", max_epochs=50, logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[SafeCheckpointIO()],
        callbacks=[ConvergenceCallback(), ResultFiles(), *options.pop("callbacks", [])],
    )  # fmt: skip
    trainer.fit(REMLModule(data.covariance), data)


def nan_on_one() -> None:
    """Process 1 reads a missing yield."""
    table = read_table("john_alpha")
    if rank() == 1:
        table.loc[5, "yield"] = float("nan")
    fit_on_two(table)


def other_table_on_one() -> None:
    """Process 1 reads a table in which a genotype has another name."""
    table = read_table("john_alpha")
    if rank() == 1:
        table["gen"] = table["gen"].astype(str).replace("G01", "G99")
    fit_on_two(table)


def other_columns_on_one() -> None:
    """Process 1 reads a table without a column."""
    table = read_table("john_alpha")
    fit_on_two(table.drop(columns="block") if rank() == 1 else table)


def process_dies() -> None:
    """Process 1 is killed in the middle of the fit."""
    fit_on_two(read_table("john_alpha"), callbacks=[Slow(), Dies()])


INSIDE = {case.__name__: case for case in (nan_on_one, other_table_on_one, other_columns_on_one, process_dies)}


# ---- the cases -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One fault.

    Attributes:
        name: What goes wrong.
        command: Arguments of Python.
        words: What one line of the output must have, one of these.
        before: Prepares the folder, and holds what must be held while the command runs.
        during: Disturbs the process.
        limit: Bytes that a file may have, for a disk that is full.
        environment: More environment variables.
    """

    name: str
    command: list[str]
    words: tuple[str, ...]
    before: Callable[[Path], contextlib.AbstractContextManager] = lambda folder: contextlib.nullcontext()
    during: Callable[[subprocess.Popen, Path], None] | None = None
    limit: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def cli(*arguments: str) -> list[str]:
    """A fit by the command line."""
    return ["-m", "openreml_nn", "fit", "--config", str(CONFIG), *arguments]


def inside(function: Callable[[], None]) -> list[str]:
    """One of the functions above in a process of its own."""
    return [str(Path(__file__).resolve()), "--inside", function.__name__]


def interrupt(process: subprocess.Popen, folder: Path) -> None:
    """Ctrl-C for the process and its children, as a terminal sends it, once a checkpoint is there."""
    began = time.perf_counter()
    while not list(folder.rglob("last.ckpt")) and time.perf_counter() < began + MINUTE:
        time.sleep(0.2)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)


@contextlib.contextmanager
def taken_port(folder: Path) -> Iterator[None]:
    """Another program listens at the port."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", PORT))
        held.listen()
        yield


@contextlib.contextmanager
def file_in_the_way(folder: Path) -> Iterator[None]:
    """A file where the log folder should be."""
    (folder / "log").write_text("a file\n")
    yield


class Code:
    """An object that makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code_has_run",)


@contextlib.contextmanager
def bad_checkpoints(folder: Path) -> Iterator[None]:
    """One that holds code, and one that is cut off."""
    torch.save({"state_dict": Code()}, folder / "code.ckpt")
    (folder / "half.ckpt").write_bytes((folder / "code.ckpt").read_bytes()[:200])
    yield


@contextlib.contextmanager
def checkpoint_of_a_fit(folder: Path) -> Iterator[None]:
    """A fit that is there already, and a table that is not its own."""
    subprocess.run([sys.executable, *cli(), *log(folder / "first")], cwd=folder, capture_output=True, check=True)
    table = read_table("john_alpha")
    table.assign(**{"yield": table["yield"] + 1.0}).to_csv(folder / "other.csv", index=False)
    table.assign(gen=table["gen"].astype(str).replace("G01", "G99")).to_csv(folder / "levels.csv", index=False)
    yield


@contextlib.contextmanager
def three_rows(folder: Path) -> Iterator[None]:
    """A table of three rows."""
    pd.DataFrame({"y": [1.0, 2.0, 4.0]}).to_csv(folder / "three.csv", index=False)
    yield


def log(folder: Path | str) -> list[str]:
    """The option that names the log folder."""
    return ["--trainer.logger.init_args.save_dir", str(folder)]


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
LAST = "first/john_alpha/version_0/checkpoints/last.ckpt"
SLOW = "--trainer.callbacks+=check_faults.Slow"
CASES = [
    Case("log folder is a file", cli(*log("log")), ("File exists", "Not a directory"), file_in_the_way),
    Case("log folder cannot be written", cli(*log("/proc/none")), ("No such file", "Permission", "Read-only")),
    Case("disk is full", cli("--trainer.logger", "false"), ("File too large", "No space"), limit=600),
    Case("checkpoint holds code", cli("--ckpt_path", "code.ckpt"), ("could run any code",), bad_checkpoints),
    Case("checkpoint is cut off", cli("--ckpt_path", "half.ckpt"), ("damaged", "not loaded"), bad_checkpoints),
    Case("checkpoint of another response", cli("--ckpt_path", LAST, "--data.table", "other.csv"),
         ("the response differs",), checkpoint_of_a_fit),
    Case("checkpoint of other levels", cli("--ckpt_path", LAST, "--data.table", "levels.csv"),
         ("'gen'", "levels"), checkpoint_of_a_fit),
    Case("checkpoint of another model", cli("--ckpt_path", LAST, "--data.random", "{gen: gen}"),
         ("of another model",), checkpoint_of_a_fit),
    Case("Ctrl-C", [*cli(SLOW), *log("runs")], ("interrupted after",), during=interrupt),
    Case("Ctrl-C, 2 processes", [*cli(*TWO, SLOW), *log("runs")], ("interrupted after",), during=interrupt),
    Case("port is taken, 2 processes", cli(*TWO), ("EADDRINUSE", "address already in use"), taken_port,
         environment={"MASTER_PORT": str(PORT)}),
    Case("more processes than rows", cli("--data.table", "three.csv", "--data.fixed", "y ~ 1", "--data.random", "null",
         "--trainer.devices", "4", "--trainer.strategy", "ddp"), ("rows", "process"), three_rows),
    Case("missing value on one of 2 processes", inside(nan_on_one), ("missing", "differ")),
    Case("other levels on one of 2 processes", inside(other_table_on_one), ("differ",)),
    Case("other columns on one of 2 processes", inside(other_columns_on_one), ("block",)),
    Case("one of 2 processes dies", inside(process_dies), ("closed by peer", "died", "reset", "exited", "Killed")),
]  # fmt: skip


def run(case: Case, folder: Path) -> tuple[str, str, int, float]:
    """Verdict, line that was printed, exit code and seconds of a case."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", **case.environment}

    def limited() -> None:
        if case.limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.limit, case.limit))

    with case.before(folder):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *case.command], cwd=folder, env=environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limited,
            )  # fmt: skip
            if case.during:
                case.during(process, folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2 * MINUTE)
            time.sleep(1.0)
            left = [p.pid for p in psutil.process_iter() if _is_left(p, process.pid)]
            seconds = time.perf_counter() - began
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            code = process.wait()
            output.seek(0)
            printed = output.read()
    lines = [line for line in printed.splitlines() if any(word in line for word in case.words)]
    line = lines[-1].strip() if lines else (printed.strip().splitlines() or [""])[-1]
    faults = {
        "exit code 0": code == 0,
        "it took too long": seconds > 1.5 * MINUTE,
        "nothing clear was said": not lines,
        "a traceback": "Traceback" in printed and "-m" in case.command,
        "processes are left": bool(left),
        "a result claims success": any(_claims(path) for path in folder.rglob("fit.json") if path not in before),
        "a file was damaged": any(not path.exists() or path.read_bytes() != old for path, old in before.items()),
        "code was run": (folder / "code_has_run").exists(),
    }
    wrong = [name for name, bad in faults.items() if bad]
    return ("FAILED: " + ", ".join(wrong)) if wrong else "passed", line, code, seconds


def _is_left(process: psutil.Process, session: int) -> bool:
    """Whether a process of a session is running."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def _claims(path: Path) -> bool:
    return bool(json.loads(path.read_text())["converged"])


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name has this word")
    parser.add_argument("--inside", choices=list(INSIDE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        INSIDE[options.inside]()
        return 0
    good, chosen = 0, [case for case in CASES if options.only in case.name]
    for case in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            verdict, line, code, seconds = run(case, Path(scratch))
        good += verdict == "passed"
        print(f"{case.name:38} {verdict:12} exit {code:3d} {seconds:5.1f} s  {line}", flush=True)
    print(f"\n{good} of {len(chosen)} passed")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
