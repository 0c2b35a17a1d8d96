"""Lightning: a module, a data module and callbacks that make a fit a ``Trainer.fit`` (an index)."""

from openreml_nn.lightning.batches import Batch, NewRowsBatch
from openreml_nn.lightning.callbacks import ConvergenceCallback, PredictionFiles, ResultFiles
from openreml_nn.lightning.checkpoints import RandomState, SafeCheckpointIO
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import REMLModule
from openreml_nn.lightning.monitor import TensorBoardMonitor

__all__ = [
    "Batch",
    "ConvergenceCallback",
    "MixedModelDataModule",
    "NewRowsBatch",
    "PredictionFiles",
    "REMLModule",
    "RandomState",
    "ResultFiles",
    "SafeCheckpointIO",
    "TensorBoardMonitor",
]
