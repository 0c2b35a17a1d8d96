"""A quiet Trainer and a few small models."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Term
from openreml_nn.lightning import ConvergenceCallback, MixedModelDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

MODELS: dict[str, dict[str, Any]] = {
    "alpha": {"table": "john_alpha", "fixed": "yield ~ rep", "random": ["gen", "rep:block"]},
    "boundary": {"table": "dyestuff2", "fixed": "Yield ~ 1", "random": ["Batch"]},
    "slopes": {
        "table": "sleepstudy",
        "fixed": "Reaction ~ Days",
        "random": {"Subject": Term(groups="Subject", design="1 + Days")},
    },
    "serial": {
        "table": "orthodont",
        "fixed": "distance ~ age * Sex",
        "residual": Term(groups="Subject", within="occ", covariance=AR1Matrix),
    },
}


@pytest.fixture
def data() -> Callable[..., MixedModelDataModule]:
    """A data module of one of `MODELS`, with further arguments."""
    return lambda name="alpha", **options: MixedModelDataModule(**MODELS[name], **options)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A Trainer that writes nothing but what it is asked for."""

    def make(**options: Any) -> L.Trainer:
        plain: dict[str, Any] = {
            "max_epochs": 200, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
            "callbacks": [ConvergenceCallback()], "default_root_dir": tmp_path,
        }  # fmt: skip
        return L.Trainer(**plain | options)

    return make
