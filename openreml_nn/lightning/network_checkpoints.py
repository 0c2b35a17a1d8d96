"""Checkpoints of a network's training: what it goes on from, and files of the last step as the model is after it."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

TRAINED = "thetas_of_the_training"
"""Key of the thetas of before the refit, in the order of ``MixedModelHead.thetas``."""


def write_last_step_again(trainer: L.Trainer, refit: bool) -> None:
    """Write the files of the last step as the model is after the fit; files of earlier steps stay.

    Args:
        trainer: The Trainer, whose `ModelCheckpoint` callbacks wrote them.
        refit: Whether the variance parameters were fitted again, which the best checkpoint is then without.

    Warns:
        UserWarning: The best checkpoint is of an earlier step than the refit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _write_again(trainer, callback, refit)


def what_differs(saved: Mapping[str, Any], own: Mapping[str, Any], most: int = 4) -> str:
    """In what a checkpoint of another network differs from a model.

    Args:
        saved: State of the checkpoint.
        own: That of the model.
        most: Number of differences to name.
    """
    there, here = _shapes(saved), _shapes(own)
    names = [name for name in {**here, **there} if there.get(name, "none") != here.get(name, "none")]
    said = [f"{name} is {there.get(name, 'none')} there and {here.get(name, 'none')} here" for name in names[:most]]
    more = [f"{len(names) - most} more differ"] if len(names) > most else []
    return "; ".join(said + more)


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    """Sizes of the tensors by name, those aside that take them from the first batch."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and not is_lazy(value)}
    return {name: " x ".join(map(str, value.shape)) or "a number" for name, value in tensors.items()}


def _write_again(trainer: L.Trainer, callback: ModelCheckpoint, refit: bool) -> None:
    paths = {callback.last_model_path, callback.best_model_path, *callback.best_k_models} - {""}
    last = [path for path in sorted(paths) if _step_of(trainer, path) == trainer.global_step]
    last = trainer.strategy.broadcast(last)
    for path in last:
        trainer.save_checkpoint(path, callback.save_weights_only)
    best = callback.best_model_path
    if refit and best and best not in last:
        rank_zero_warn(
            f"The best checkpoint, {best}, is of an earlier step and predicts with the variance parameters before "
            f"the refit. The refit is in the model in memory, and in what `trainer.save_checkpoint` writes; for "
            f"that of the best checkpoint load it and call `condition(loader, refit=True)`, or, on the command line, "
            f"`openreml-nn network refit --ckpt_path {best}`."
        )


def _step_of(trainer: L.Trainer, path: str) -> int | None:
    """The step of a checkpoint, of which no tensor is read; None if it is not there, and on other processes."""
    if not trainer.is_global_zero:
        return None
    try:
        return trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="meta")["global_step"]
    except FileNotFoundError:
        return None
