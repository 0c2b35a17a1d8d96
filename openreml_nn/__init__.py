"""Linear mixed models, fitted by restricted maximum likelihood, as ordinary PyTorch and Lightning modules."""

from importlib import import_module
from typing import Any

from openreml_nn.fit import fit
from openreml_nn.objectives import ML, REML
from openreml_nn.optim import AverageInformation
from openreml_nn.result import FitResult

__version__ = "0.1.0"
_LAZY = dict.fromkeys(
    ("REMLModule", "MixedModelDataModule", "MixedModelRegressor", "NetworkDataModule"), "openreml_nn.lightning"
)

__all__ = ["ML", "REML", "AverageInformation", "FitResult", "fit"]


def __getattr__(name: str) -> Any:
    """Lightning's parts on first use, so that ``import openreml_nn`` does not import lightning."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
