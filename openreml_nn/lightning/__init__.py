"""Lightning: a module, a data module and callbacks that make a fit a ``Trainer.fit`` (an index)."""

from openreml_nn.lightning.batches import Batch, NewRowsBatch
from openreml_nn.lightning.callbacks import ConvergenceCallback, PredictionFiles, ResultFiles
from openreml_nn.lightning.checkpoints import RandomState, SafeCheckpointIO
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import REMLModule
from openreml_nn.lightning.monitor import TensorBoardMonitor
from openreml_nn.lightning.network_data import NetworkDataModule
from openreml_nn.lightning.network_files import RefitFiles, RowPredictionFiles
from openreml_nn.lightning.regressor import MixedModelRegressor

__all__ = [
    "Batch",
    "ConvergenceCallback",
    "MixedModelDataModule",
    "MixedModelRegressor",
    "NetworkDataModule",
    "NewRowsBatch",
    "PredictionFiles",
    "REMLModule",
    "RandomState",
    "RefitFiles",
    "ResultFiles",
    "RowPredictionFiles",
    "SafeCheckpointIO",
    "TensorBoardMonitor",
]
