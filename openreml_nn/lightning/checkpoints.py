"""Checkpoints that are whole or not there, hold no code, and bring back the random numbers.

Lightning writes a checkpoint into the folder for temporary files and moves it. Where that is another file system,
moving is copying, and a process that is killed meanwhile leaves half a file in the place of a good one.
`SafeCheckpointIO` writes beside the place instead. It does not wait for the disk, which would take longer than a step
of a small fit: a checkpoint outlives its process, and a machine that loses power may lose the last ones.
"""

import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from openreml_nn.report import write_whole
from openreml_nn.solvers import processes


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint that is whole at any moment, the old or the new one; loads tensors and plain values only.

    A path with a protocol, such as ``s3://``, is written by Lightning's own way.

    Example:
        >>> import lightning as L
        >>> from openreml_nn.lightning import SafeCheckpointIO
        >>> trainer = L.Trainer(plugins=[SafeCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It cannot be written; the file that was there before is untouched.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: torch.save(checkpoint, file), sync=False)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, without running anything that it holds.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no checkpoint, is damaged, or holds objects that would run code on loading.
        """
        if weights_only is False:
            raise ValueError("`SafeCheckpointIO` loads tensors and plain values only; leave out `weights_only=False`.")
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            found = _refused(error)
            raise ValueError(
                f"The checkpoint {path} was not loaded: it holds {found}, and loading that could run any code. A "
                f"checkpoint of a fit holds tensors and plain values only. Take one that this package wrote."
            ) from error
        except (RuntimeError, EOFError, KeyError) as error:
            said = str(error).partition(". ")[0]
            raise ValueError(f"The file {path} is no checkpoint, or a damaged one: {said}.") from error


MIXED_MODEL, NETWORK = "objective.", "head."  # what names of parameters begin with, of a `REMLModule` and of a network
KINDS = {
    MIXED_MODEL: ("a mixed model", "`openreml-nn fit|validate|predict`"),
    NETWORK: ("a network with random effects", "`openreml-nn network fit|validate|predict|refit`"),
}


def require_kind(checkpoint: Mapping[str, Any], wanted: str, path: str | Path) -> None:
    """Refuse a checkpoint of another kind of model.

    Args:
        checkpoint: Its content.
        wanted: The kind, `MIXED_MODEL` or `NETWORK`.
        path: The file.

    Raises:
        ValueError: It is of another kind.
    """
    names = checkpoint.get("state_dict", {})
    found = [kind for kind in KINDS if any(name.startswith(kind) for name in names)]
    if wanted in found:
        return
    said = [f"{KINDS[kind][0]}, which {KINDS[kind][1]} take" for kind in found] or ["something else"]
    kind, commands = KINDS[wanted]
    raise ValueError(f"The checkpoint {path} is of {said[0]}. This is one of {commands}, for that of {kind}.")


def run_folder(checkpoint: str | Path) -> str:
    """Folder of the run that a checkpoint belongs to."""
    folder = Path(checkpoint).parent
    return str(folder.parent if folder.name == "checkpoints" else folder)


def _refused(error: Exception) -> str:
    """What torch would not unpickle, from its message."""
    words = str(error).replace("GLOBAL ", "\nGLOBAL ").splitlines()
    named = [line.split()[1] for line in words if line.startswith("GLOBAL ") and len(line.split()) > 1]
    return f"an object of type {named[0]}" if named else "more than tensors and plain values"


class RandomState(Callback):
    """Keeps the states of the random number generators of Python, NumPy and torch in each checkpoint.

    A fit of a mixed model draws nothing. With a network as the mean, its dropout and the order of its batches go on
    from a checkpoint as they would have without the break. Each process gets its own state back where their number is
    the same; where it is not, none is changed.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = processes().objects(_random_state())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(_KEY, [])
        if len(states) == trainer.world_size:
            _restore_random_state(states[trainer.global_rank])


_KEY = "openreml_nn_random_state"


def _random_state() -> dict[str, Any]:
    """States as tensors and plain values, which load without unpickling objects."""
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
