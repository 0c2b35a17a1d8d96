"""A checkpoint of a network's training that was interrupted, or was the best one, made ready for predictions."""

from pathlib import Path

import lightning as L

from openreml_nn.lightning.checkpoints import run_folder
from openreml_nn.lightning.network_data import NetworkDataModule
from openreml_nn.lightning.network_files import write_refit
from openreml_nn.lightning.regressor import MixedModelRegressor


class NetworkTrainer(L.Trainer):
    """A Trainer that also does the last part of a training alone: the refit, and the random effects."""

    def refit(
        self,
        model: MixedModelRegressor,
        datamodule: NetworkDataModule,
        ckpt_path: str,
        hold: bool = False,
        folder: str | None = None,
    ) -> Path:
        """Fit the variance parameters of a checkpoint by REML, its network being held, and predict random effects.

        The results and a checkpoint, from which a training goes on as from the given one, are written into a folder.

        Args:
            model: The model of the training.
            datamodule: Its data; other data are refused.
            ckpt_path: A checkpoint of the training, of any epoch.
            hold: Keep the variance parameters of the checkpoint, and predict the random effects alone.
            folder: Where to write; when left out ``<name of the checkpoint>-refit`` in the folder of the run, or
                ``-held`` with ``hold``.

        Returns:
            The path of the new checkpoint, ``refit.ckpt``.

        Raises:
            ValueError: The checkpoint is of other data or another model, or this is one of several processes.
        """
        if self.world_size > 1:
            raise ValueError(f"`refit` runs in one process, got {self.world_size}. Give --trainer.devices 1.")
        files = self.strategy.checkpoint_io
        checkpoint = files.load_checkpoint(ckpt_path)
        if (data := checkpoint.get(type(datamodule).__qualname__)) is not None:
            datamodule.load_state_dict(data)
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
        model.trainer = self
        self.precision_plugin.convert_module(model).to(self.strategy.root_device)
        model.condition(datamodule.train_dataloader(), refit=not hold)
        checkpoint["state_dict"] = model.state_dict()
        model.on_save_checkpoint(checkpoint)
        place = Path(folder or refit_folder(ckpt_path, hold))
        write_refit(model, place, held="Variance parameters as in the checkpoint")
        files.save_checkpoint(checkpoint, place / "refit.ckpt")
        print(f"Checkpoint: {place / 'refit.ckpt'}")
        return place / "refit.ckpt"


def refit_folder(checkpoint: str | Path, hold: bool = False) -> str:
    """Folder of the refit of a checkpoint, or of the random effects alone."""
    return str(Path(run_folder(checkpoint)) / f"{Path(checkpoint).stem}-{'held' if hold else 'refit'}")
