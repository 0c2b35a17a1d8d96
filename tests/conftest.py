"""What all tests share: one thread, a seed, another device, and no GPU test where there is no GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openreml_nn import FitResult, fit
from openreml_nn.data import MixedModel, Term
from openreml_nn.testing.elsewhere import Elsewhere

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@contextmanager
def _cuda() -> Iterator[torch.device]:
    yield torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _elsewhere() -> Iterator[torch.device]:
    if not Elsewhere.works():
        pytest.skip("this version of torch has no device to pretend")
    with Elsewhere() as device:
        yield torch.device(device.name, 0)


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
def another_device(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[torch.device]]:
    """Gives, in a ``with`` block, a device that is not the CPU: a GPU, and one that is not there (`Elsewhere`)."""
    return _cuda if request.param == "cuda" else _elsewhere


def fitted(table: str, fixed: str, random: Any) -> FitResult:
    model = MixedModel(table, fixed, random)
    return fit(model.V, model.y, model.X, x_names=model.x_names)


@pytest.fixture(scope="session")
def alpha() -> FitResult:
    return fitted("john_alpha", "yield ~ rep", ["gen", "rep:block"])


@pytest.fixture(scope="session")
def slopes() -> FitResult:
    return fitted("sleepstudy", "Reaction ~ Days", {"Subject": Term("Subject", "1 + Days")})


@pytest.fixture(scope="session")
def dyestuff2() -> FitResult:
    return fitted("dyestuff2", "Yield ~ 1", ["Batch"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What fits on several processes found, by `ranks_worker.py`, which is run once."""
    file = tmp_path_factory.mktemp("ranks") / "found.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("ranks_worker.py"), file], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())
