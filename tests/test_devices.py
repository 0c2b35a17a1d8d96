"""Fits, layers and Lightning on another device than the CPU: the same numbers, and few waits of the host.

Each test runs on a GPU where there is one (marked ``gpu``), and everywhere on a device that is not there, on which an
operation on tensors of two devices is an error, as on a GPU, and the host's waits are counted.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openreml_nn import REML, FitResult, MixedModelRegressor, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    FactorAnalyticMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.data import Kernel, MixedModel, Term, read_table
from openreml_nn.lightning import ConvergenceCallback, MixedModelDataModule, REMLModule
from openreml_nn.likelihood import average_information
from openreml_nn.nn import Effects, MixedModelHead
from openreml_nn.optim import AverageInformation, Geometry
from openreml_nn.solvers import Evaluation, random_terms
from openreml_nn.solvers.reductions import SpectralDecomposition, reduce_kernel
from openreml_nn.testing.elsewhere import DEVICE, Elsewhere, TwoDevices

Another = Callable[[], AbstractContextManager[torch.device]]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
CONFIGS = [path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")) if path.stem != "regressor"]


# ---- models ----------------------------------------------------------------------------------------------------------


def table(name: str) -> Callable[[], tuple[Matrix, Tensor, Tensor]]:
    def make() -> tuple[Matrix, Tensor, Tensor]:
        model = TABLES[name]()
        return model.V, model.y, model.X

    return make


def markers() -> tuple[Matrix, Tensor, Tensor]:
    """60 rows with 12 covariates of random slopes: a kernel by its small side."""
    W, noise = normal(60, 12), normal(60, 2)
    V = Sum(markers=CovariancePropagation(W, ScalarMatrix(12)), residual=ScalarMatrix(60))
    return V, W @ torch.linspace(-1, 1, 12, dtype=torch.float64) + noise[:, 0], torch.ones(60, 1, dtype=torch.float64)


def traits() -> tuple[Matrix, Tensor, Tensor]:
    """Two traits of 30 related individuals."""
    W, ones = normal(30, 40), torch.ones(30, 1, dtype=torch.float64)
    K, both = SimpleMatrix(W @ W.mT / 40), torch.eye(2, dtype=torch.float64)
    V = Sum(
        genetic=KroneckerProduct(UnstructuredMatrix(2), K),
        residual=KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(30)),
    )
    shared = torch.linalg.cholesky(K()) @ normal(30, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.8]], dtype=torch.float64)
    return V, (shared + normal(30, 2)).mT.reshape(-1), torch.kron(both, ones)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


TABLES: dict[str, Callable[[], MixedModel]] = {
    "crossed": lambda: MixedModel("john_alpha", "yield ~ rep", ["gen", "rep:block"]),
    "slopes": lambda: MixedModel("sleepstudy", "Reaction ~ Days", {"Subject": Term("Subject", "1 + Days")}),
    "serial": lambda: MixedModel(
        "orthodont", "distance ~ age * Sex", residual=Term("Subject", within="occ", covariance=AR1Matrix)
    ),
    "ragged": lambda: MixedModel(
        read_table("sleepstudy").iloc[[i for i in range(180) if i % 7]], "Reaction ~ Days", ["Subject"]
    ),
    "boundary": lambda: MixedModel("dyestuff2", "Yield ~ 1", ["Batch"]),
    "kernel": lambda: MixedModel(
        "gblup150", "y ~ trial", {"line": Term("line", relationship=Kernel("gblup150_K"))}
    ),
    "loadings": lambda: MixedModel(
        "fa1", "y ~ env", {"gen": Term("gen", within="env", covariance=FactorAnalyticMatrix)},
        Term(design="0 + env"),
    ),
}  # fmt: skip
MODELS = {name: table(name) for name in TABLES} | {"markers": markers, "traits": traits}

# Model and solver; how often an evaluation may wait for numbers, look at a factor, and take numbers from the host.
# One wait is for what the optimiser reads, one write is θ.
CASES = {
    ("crossed", "dense"): (1, 3, 1),
    ("serial", "dense"): (1, 3, 1),
    ("crossed", "mixed_model_equations"): (3, 2, 1),
    ("slopes", "mixed_model_equations"): (2, 1, 1),
    ("kernel", "mixed_model_equations"): (3, 2, 1),
    ("slopes", "blocks"): (1, 2, 1),
    ("loadings", "blocks"): (1, 2, 1),
    ("ragged", "blocks"): (2, 1, 1),
    ("kernel", "spectral"): (2, 0, 4),
    ("markers", "spectral"): (2, 0, 4),
    ("boundary", "spectral"): (2, 0, 4),
    ("traits", "spectral_traits"): (2, 2, 1),
}
every_solver = pytest.mark.parametrize(("model", "solver"), CASES, ids=lambda name: name)


def moved(V: Matrix, y: Tensor, X: Tensor, device: torch.device) -> tuple[Matrix, Tensor, Tensor]:
    return V.to(device), y.to(device), X.to(device)


def close(there: Any, here: Any, relative: float = 1e-8) -> None:
    """Numbers of another device are those of the CPU."""
    there, here = (x.cpu() if isinstance(x, Tensor) else torch.tensor(np.array(x)) for x in (there, here))
    torch.testing.assert_close(there, here, rtol=relative, atol=relative, equal_nan=True, check_dtype=False)


# ---- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The response 'Yield' is")
@every_solver
def test_fit(model: str, solver: str, another_device: Another) -> None:
    V, y, X = MODELS[model]()
    here = fit(V, y, X, solver=solver)
    torch.manual_seed(0)
    again = MODELS[model]()
    with another_device() as device:
        there = fit(*moved(*again, device), solver=solver)
        assert there.converged == here.converged
        assert there.held == here.held
        assert there.loglik == pytest.approx(here.loglik, rel=1e-10)
        free = [not h for h in here.held]  # a variance of zero may stand at any raw theta that is far down
        close(there.theta.cpu()[free], here.theta[free])
        assert {there.theta.device, there.beta.device, there.evaluation.Py.device} == {device}
        close(there.beta, here.beta)
        close(there.beta_cov, here.beta_cov)
        compare_tables(there.variance, here.variance)
        compare_tables(there.fixed_effects, here.fixed_effects)
        compare_tables(there.blup(), here.blup())
        new = {term.name: term.Z for term in random_terms(V, here.theta)}
        compare_tables(there.predict(X, new), here.predict(X, new))  # designs that are on the CPU


def compare_tables(there: pd.DataFrame, here: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(there, here, rtol=1e-7, atol=1e-8)


def test_a_kernel_elsewhere_has_eigenvectors(another_device: Another) -> None:
    """The reduction to a band is one of the CPU."""
    W = normal(5, 8)
    with another_device() as device:
        reduction = reduce_kernel((W @ W.mT).to(device), eigenvectors=False)
        assert isinstance(reduction, SpectralDecomposition)
        x = normal(5, 2).to(device)
        close(reduction.rotate_back(reduction.rotate(x)), x, 1e-12)


def test_one_device_only() -> None:
    V, y, X = MODELS["crossed"]()
    with Elsewhere() as device, pytest.raises(ValueError, match=r"V and y must be on one device, got V on cpu"):
        fit(V, y.to(device.name), X.to(device.name), solver="dense")


# ---- how often the host waits ----------------------------------------------------------------------------------------


class Loop:
    """The optimiser on a prepared problem, as a user drives it."""

    def __init__(self, model: tuple[Matrix, Tensor, Tensor], solver: str) -> None:
        V, y, X = model
        self.objective, self.evaluations = REML(V, solver), 0
        self.problem = self.objective.prepare(y, X)
        self.optimizer = AverageInformation(
            V.theta_parameters(), lambda: average_information(self.evaluation), geometry=lambda: Geometry.of(V)
        )

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        self.evaluation: Evaluation = self.problem.evaluate()
        self.evaluations += 1
        loss = -self.objective.loglik(self.evaluation)
        loss.backward()
        return loss

    def step(self) -> bool:
        """Make a step; whether the optimiser has ended."""
        self.optimizer.step(self.closure)
        return self.optimizer.progress.done


@every_solver
def test_waits_of_the_host(model: str, solver: str) -> None:
    """What is done once is not counted: that of the preparation and of the first step."""
    given = MODELS[model]()
    with Elsewhere() as device:
        loop = Loop(moved(*given, torch.device(device.name)), solver)
        loop.step()
        device.forget()
        before = loop.evaluations
        loop.step()
        loop.step()
        count = loop.evaluations - before
    assert count > 0
    allowed = [per_evaluation * count for per_evaluation in CASES[model, solver]]
    for events, most in zip((device.reads, device.checks, device.writes), allowed, strict=True):
        assert len(events) <= most, "\n".join(sorted(set(events)))


def test_a_change_of_the_parameters_is_noticed() -> None:
    """The optimiser looks at its parameters only where torch has counted a change."""
    V, y, X = MODELS["crossed"]()
    with Elsewhere() as device:
        loop = Loop(moved(V, y, X, torch.device(device.name)), "mixed_model_equations")
        loop.step()
        loop.step()
        V.set_theta(torch.zeros(3, dtype=torch.float64, device=device.name))
        loop.step()
        assert loop.optimizer.progress.iteration == 1


# ---- Lightning -------------------------------------------------------------------------------------------------------


class PretendAccelerator(CPUAccelerator):
    """Lets Lightning put a module on the device that is not there."""

    def setup_device(self, device: torch.device) -> None:
        pass


def trainer_options(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": 1}
    return {"strategy": SingleDeviceStrategy(device, PretendAccelerator())}


def configured(config: Path) -> MixedModelDataModule:
    parser = ArgumentParser()
    parser.add_class_arguments(MixedModelDataModule, "data")
    return parser.instantiate(parser.parse_path(config)).data


def run(data: MixedModelDataModule, module: REMLModule, folder: Path, **options: Any) -> FitResult:
    trainer = L.Trainer(max_epochs=200, callbacks=[ConvergenceCallback()], default_root_dir=folder, **QUIET, **options)
    trainer.fit(module, data)
    return module.result()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trainer(config: Path, another_device: Another, tmp_path: Path) -> None:
    here = run(data := configured(config), REMLModule(data.covariance), tmp_path, accelerator="cpu", devices=1)
    again = configured(config)
    with another_device() as device:
        there = run(again, REMLModule(again.covariance), tmp_path, **trainer_options(device))
        assert there.converged
        assert there.theta.device == device
        assert there.loglik == pytest.approx(here.loglik, rel=1e-10)
        close(there.theta, here.theta)
        compare_tables(there.blup(), here.blup())


def test_waits_of_a_trainer(tmp_path: Path) -> None:
    """A step of a Trainer reads what a step of the optimiser reads, and the data go to the device once."""
    data = configured(next(path for path in CONFIGS if path.stem == "john_alpha"))
    module = REMLModule(data.covariance)
    counted: list[int] = []

    class Count(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            device.forget()

        def on_train_batch_end(self, *_: Any) -> None:
            counted.append(len(device.reads) - 3 * module.history[-1].trials)

    with Elsewhere() as device:
        trainer = L.Trainer(
            max_epochs=9, callbacks=[ConvergenceCallback(), Count()], default_root_dir=tmp_path, **QUIET,
            **trainer_options(torch.device(DEVICE, 0)),
        )  # fmt: skip
        trainer.fit(module, data)
    assert max(counted[1:]) <= 0


# ---- a network, whose layers have tests on another device beside their own -------------------------------------------


@pytest.mark.filterwarnings("ignore:.*many workers", "ignore:.*no `val_dataloader`", "ignore:.*rows of the same levels")
@pytest.mark.parametrize("mode", ["batch", "features", "exact"])
def test_regressor(mode: str, another_device: Another, tmp_path: Path) -> None:
    x, y, codes = normal(60, 3).float(), normal(60).float(), torch.arange(60) % 7
    network = nn.Linear(3, 2 if mode == "features" else 1)
    rows = [(x[i], y[i], {"a": codes[i]}) for i in range(60)]

    def results(**options: Any) -> list[Tensor]:
        head = MixedModelHead({"a": Effects(7)}, mode=mode)
        module = MixedModelRegressor(copy.deepcopy(network), head, lambda own: torch.optim.Adam(own, lr=0.05))
        trainer = L.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET, **options)
        whole = DataLoader([(x, y, {"a": codes})], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, whole if mode == "exact" else DataLoader(rows, batch_size=20))
        parts = trainer.predict(module, DataLoader(rows, batch_size=30))
        assert parts is not None
        return [torch.cat(own).cpu() for own in zip(*parts, strict=True)]

    here = results(accelerator="cpu", devices=1)
    with another_device() as device:
        for one, other in zip(results(**trainer_options(device)), here, strict=True):
            close(one, other, 1e-4)  # the network is float32


# ---- the device that is not there ------------------------------------------------------------------------------------


def test_elsewhere_refuses_and_counts() -> None:
    with Elsewhere() as device:
        x = torch.tensor([3.0, -1.0, 2.0], device=device.name)
        with pytest.raises(TwoDevices, match=r"aten.add.Tensor takes tensors elsewhere and here; here are \(3,\)"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match=r"numpy"):
            x.numpy()
        assert [device.reads, device.checks] == [[], []]
        assert (x * torch.tensor(2.0)).tolist() == [6.0, -2.0, 4.0]  # a number may come from the CPU
        waits: list[Callable[[], object]] = [
            lambda: bool((x > 0).all()), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x),
            lambda: x.cpu(), lambda: x.max().item(), lambda: torch.unique(x), lambda: f"{x[0]:.1f}",
        ]  # fmt: skip
        for number, wait in enumerate(waits, 1):
            wait()
            assert len(device.reads) == number + 1
        torch.linalg.cholesky(torch.eye(2, device=device.name))
        assert len(device.checks) == 1
        device.forget()
        assert x[[0, 2]].shape == (2,)
        assert len(device.writes) == 1
        assert "test_devices.py" in device.writes[0]
    with pytest.raises(RuntimeError, match="outside of its `with` block"):
        x + x
