"""The command line: ``openreml-nn fit|validate|predict --config model.yaml``, on LightningCLI.

A mistake of the user is one line on stderr and exit code 1 or 2. With the environment variable ``OPENREML_NN_DEBUG`` set
to anything, it is a traceback.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from openreml_nn.lightning import (
    ConvergenceCallback,
    MixedModelDataModule,
    PredictionFiles,
    REMLModule,
    ResultFiles,
    TensorBoardMonitor,
)

DEBUG = "OPENREML_NN_DEBUG"
COMMANDS = ("fit", "validate", "predict")
CALLBACKS = {
    "convergence": ConvergenceCallback,
    "results": ResultFiles,
    "predictions": PredictionFiles,
    "monitor": TensorBoardMonitor,
    "checkpoint": ModelCheckpoint,
}


class REMLCLI(LightningCLI):
    """LightningCLI with the covariance taken from the data, and the callbacks of a fit under keys of their own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.covariance", "model.covariance", apply_on="instantiate")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(
            {
                "convergence.verbose": True,
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Name the log folder after the configuration file, and ask for what a command cannot do without."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and not config.get("ckpt_path"):
            raise MisconfigurationException(f"`{self.subcommand}` needs the checkpoint of a fit: --ckpt_path FILE.")
        logger = config.trainer.logger
        if getattr(logger, "class_path", "").endswith("TensorBoardLogger") and logger.init_args.name is None:
            files = [Path(str(file)) for file in config.get("config") or []]
            logger.init_args.name = files[0].stem if files else self.subcommand


def trainer_defaults() -> dict[str, Any]:
    """Trainer options that suit a fit: 200 steps at most, one device, a log entry for each step, no progress bar."""
    logger = {
        "class_path": f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}",
        "init_args": {"save_dir": "runs", "name": None, "default_hp_metric": False},
    }
    return {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "max_epochs": 200,
        "log_every_n_steps": 1,
        "logger": logger,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: The command and its options; those of the process when left out.

    Raises:
        SystemExit: With code 2 for a mistake in the options, 1 for one in the data or the model.
    """
    with quiet():
        try:
            REMLCLI(
                REMLModule,
                MixedModelDataModule,
                args=None if args is None else list(args),
                trainer_defaults=trainer_defaults(),
                seed_everything_default=False,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={name: {"exit_on_error": False} for name in COMMANDS} | {"exit_on_error": False},
            )
        except Exception as error:
            if os.environ.get(DEBUG) or not is_mistake(error):
                raise
            print(f"openreml-nn: error: {message(error)}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, ArgumentError) else 1) from None


def is_mistake(error: BaseException) -> bool:
    """Whether an error is one of the user, as this package raises them, and not a defect of a program."""
    if isinstance(error, (ArgumentError, FileNotFoundError, MemoryError, MisconfigurationException)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    return own and isinstance(error, (ValueError, KeyError, TypeError))


def message(error: BaseException) -> str:
    """What an error says, on one line; a KeyError without its quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without hints and advertisements, and warnings as one line each."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", PossibleUserWarning)
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message=".*litlogger.*")
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            log.setLevel(level)


def _show_warning(text: Any, category: type, filename: str, line: int, file: Any = None, code: str | None = None) -> None:
    print(f"openreml-nn: warning: {' '.join(str(text).split())}", file=file or sys.stderr)
