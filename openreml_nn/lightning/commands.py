"""The commands of the command line, as LightningCLI makes them from the parameters of a module and a data module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from openreml_nn.lightning.callbacks import ConvergenceCallback, PredictionFiles, ResultFiles
from openreml_nn.lightning.checkpoints import (
    MIXED_MODEL,
    NETWORK,
    RandomState,
    SafeCheckpointIO,
    require_kind,
    run_folder,
)
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import REMLModule
from openreml_nn.lightning.monitor import TensorBoardMonitor
from openreml_nn.lightning.network_data import NetworkDataModule
from openreml_nn.lightning.network_files import RefitFiles, RowPredictionFiles
from openreml_nn.lightning.network_refit import NetworkTrainer
from openreml_nn.lightning.regressor import MixedModelRegressor

COMMANDS = ("fit", "validate", "predict")
RUNS = "runs"
"""Folder of the log folders, unless the Trainer's ``default_root_dir`` says another."""
FLUSH_SECONDS = 2
"""Between two writings of the TensorBoard log; Ctrl-C amid one may have to wait for the next, by default 120 s."""


class Commands(LightningCLI):
    """Base class of LightningCLI with callbacks under keys of their own, log folders by name and safe checkpoints."""

    MODULE: ClassVar[type[L.LightningModule]]
    DATA: ClassVar[type[L.LightningDataModule]]
    CALLBACKS: ClassVar[Mapping[str, type[Callback]]]
    KIND: ClassVar[str]

    @classmethod
    def parts(cls) -> dict[str, type]:
        """The class behind each key of a configuration."""
        return {"model": cls.MODULE, "data": cls.DATA, "trainer": L.Trainer, **cls.CALLBACKS}

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in self.CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.enable_version_counter": False})

    def _parse_ckpt_path(self) -> None:
        """Options are those of the configuration, not of the checkpoint, of which one could then change none."""
        self._checkpoint()

    def _checkpoint(self) -> dict[str, Any]:
        """The checkpoint of a command, empty where there is none; a damaged one or one of another kind is refused."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if not path or not Path(path).is_file():
            return {}
        checkpoint = SafeCheckpointIO().load_checkpoint(path)
        require_kind(checkpoint, self.KIND, path)
        return checkpoint

    def before_instantiate_classes(self) -> None:
        """Name the log folder after the configuration file; other commands make none, and write beside the fit."""
        config = self.config[self.subcommand]
        logger = config.trainer.logger
        board = getattr(logger, "class_path", "").endswith("TensorBoardLogger")
        if board and logger.init_args.save_dir == RUNS and config.trainer.default_root_dir:
            logger.init_args.save_dir = str(config.trainer.default_root_dir)
        if self.subcommand != "fit":
            if not config.get("ckpt_path"):
                raise MisconfigurationException(f"`{self.subcommand}` needs the checkpoint of a fit: --ckpt_path FILE.")
            self.save_config_callback = None
            config.trainer.logger = False if board else logger
            config.predictions.folder = config.predictions.folder or run_folder(config.ckpt_path)
        elif board and logger.init_args.name is None:
            files = [Path(str(file)) for file in config.get("config") or []]
            logger.init_args.name = files[0].stem if files else self.subcommand


class REMLCLI(Commands):
    """Fits a `REMLModule` to a `MixedModelDataModule`, whose covariance it takes.

    Args:
        options: Those of ``LightningCLI``.
    """

    MODULE, DATA, KIND = REMLModule, MixedModelDataModule, MIXED_MODEL
    CALLBACKS: ClassVar[Mapping[str, type[Callback]]] = {
        "convergence": ConvergenceCallback,
        "results": ResultFiles,
        "predictions": PredictionFiles,
        "monitor": TensorBoardMonitor,
        "checkpoint": ModelCheckpoint,
        "random_state": RandomState,
    }

    def __init__(self, **options: Any) -> None:
        own = {"log_every_n_steps": 1, "enable_progress_bar": False, "max_epochs": 200}
        defaults: dict[str, Any] = {"trainer_defaults": trainer_defaults() | own, "seed_everything_default": False}
        super().__init__(self.MODULE, self.DATA, **(defaults | options))

    def _parse_ckpt_path(self) -> None:
        """A fit that goes on maximises what it did before; predictions take this and the rest from the checkpoint."""
        if self.config.get("subcommand") != "fit":
            self._checkpoint()
            super(Commands, self)._parse_ckpt_path()
            return
        before = self._checkpoint().get("hyper_parameters", {}).get("objective")
        now = self.config.fit.model.get("objective")
        if isinstance(before, str) and isinstance(now, str) and before.upper() != now.upper():
            raise MisconfigurationException(
                f"The checkpoint is of a fit by {before}, and this one is by {now}. Give --model.objective {before}, "
                f"or leave out --ckpt_path."
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.covariance", "model.covariance", apply_on="instantiate")
        parser.set_defaults({"convergence.verbose": True, "checkpoint.filename": "last"})


class NetworkCLI(Commands):
    """Trains a `MixedModelRegressor` on a `NetworkDataModule`, whose random effects its head takes.

    Beside the other commands there is ``refit``, for a checkpoint of a training that did not end, or of its best epoch.

    Args:
        options: Those of ``LightningCLI``.
    """

    MODULE, DATA, KIND = MixedModelRegressor, NetworkDataModule, NETWORK
    CALLBACKS: ClassVar[Mapping[str, type[Callback]]] = {
        "results": RefitFiles,
        "predictions": RowPredictionFiles,
        "checkpoint": ModelCheckpoint,
        "random_state": RandomState,
    }

    def __init__(self, **options: Any) -> None:
        own = {"log_every_n_steps": 10, "use_distributed_sampler": False}
        defaults: dict[str, Any] = {"trainer_class": NetworkTrainer, "trainer_defaults": trainer_defaults() | own}
        super().__init__(self.MODULE, self.DATA, **(defaults | options))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return Commands.subcommands() | {"refit": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.effects", "model.head.init_args.effects", apply_on="instantiate")
        parser.set_defaults(
            {"checkpoint.save_last": True, "model.head": {"class_path": "openreml_nn.nn.MixedModelHead"}}
        )


def trainer_defaults() -> dict[str, Any]:
    """Trainer options of every command: one device, a log folder under `RUNS`, checkpoints without code in them."""
    logger = {
        "class_path": f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__name__}",
        "init_args": {"save_dir": RUNS, "name": None, "default_hp_metric": False, "flush_secs": FLUSH_SECONDS},
    }
    return {
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "logger": logger,
        "plugins": [{"class_path": f"{SafeCheckpointIO.__module__}.{SafeCheckpointIO.__name__}"}],
        "enable_model_summary": False,
    }
