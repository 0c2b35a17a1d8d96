"""Fits on several processes, run once in a program of their own for `test_ranks.py` and `lightning/test_ranks.py`.

    python tests/ranks_worker.py FILE    writes the findings as JSON

The processes are forked from this program, which has imported everything and computed nothing.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import cli
from openreml_nn.covariance import AR1Matrix, CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.data import MixedModel, Term, read_table
from openreml_nn.lightning import (
    Batch,
    ConvergenceCallback,
    MixedModelDataModule,
    MixedModelRegressor,
    PredictionFiles,
    REMLModule,
    ResultFiles,
)
from openreml_nn.likelihood import (
    average_information,
    beta,
    beta_cov,
    blup,
    observed_information,
    predict,
    prediction_error_variance,
    restricted_loglik,
)
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead
from openreml_nn.solvers import (
    ALONE,
    SOLVERS,
    ProcessGroup,
    Ranks,
    choose_shared,
    prepare_fixed_effects,
    processes,
    random_terms,
)

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A script of the project as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROCESSES, CHECK, BENCHMARK = script("_processes"), script("check_ranks"), script("benchmark_ranks")


def told(work: Callable[[], Any]) -> str:
    """The error that work raises, as a text."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- solvers ---------------------------------------------------------------------------------------------------------


def collectives(ranks: Ranks) -> dict[str, Any]:
    """Each operation, the derivatives of a sum, and an error on one process."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64) * (ranks.rank + 1)
    theta = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def loss(theta: Tensor) -> Tensor:  # (Σ_r x_r'θ³)²
        return ranks.sum(x @ ranks.shared(theta) ** 3) ** 2

    before = ranks.sent
    ranks.sum(x)
    sent = ranks.sent - before
    (slope,) = torch.autograd.grad(loss(theta), theta)
    H = torch.autograd.functional.hessian(loss, theta)
    numbers = ranks.sum(torch.rand(1000, dtype=torch.float64) + ranks.rank)
    return {
        "sums": [part.tolist() for part in ranks.sums(x, x[:1].reshape(1, 1))], "sent": sent,
        "same": all(torch.equal(numbers, own) for own in ranks.gather(numbers)),
        "largest": ranks.largest(x).tolist(), "first": ranks.first(x).tolist(),
        "gather": [part.tolist() for part in ranks.gather(x[: ranks.rank])],
        "objects": ranks.objects({"rank": ranks.rank}), "to_first": ranks.to_first(ranks.rank * "x"),
        "slope": slope.tolist(), "hessian": H.tolist(),
        "error": told(lambda: ranks.together(lambda: 1 // (ranks.rank - 1))),
        "all": told(lambda: ranks.together(lambda: 1 // 0)),
    }  # fmt: skip


def design() -> tuple[Tensor, Tensor]:
    """30 rows with aliased columns of different sizes, a factor of which a process may lack levels, and an offset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    ones, level = torch.ones(30, 1, dtype=torch.float64), torch.arange(30) // 10
    levels = [(level == i)[:, None].double() for i in (1, 2)]
    X = torch.cat([ones, x, 1e6 * x[:, :1] - 1e3 * ones, *levels, ones], dim=1)
    return 1e8 + torch.randn(30, generator=generator, dtype=torch.float64), X


def fixed_effects(ranks: Ranks, rows: slice) -> dict[str, Any]:
    """What of the fixed effects all processes know, and derivatives of a function of U, e and R by y and X."""
    y, X = design()
    y, X = y[rows].clone().requires_grad_(), X[rows].clone().requires_grad_()
    fixed = prepare_fixed_effects(y, X[:, [0, 1, 2, 4, 5]], ranks=ranks)
    weight = torch.arange(30, dtype=torch.float64)[rows]
    U, e = fixed.U, fixed.e
    M = ranks.sum(U.mT @ (weight[:, None] * U))
    f = torch.logdet(M + torch.eye(len(M))) + ranks.sum(weight @ e**2) / 1e2 + fixed.logdet_RtR
    slopes = torch.autograd.grad(f, (y, X))
    with torch.no_grad():
        all_columns = prepare_fixed_effects(y, X, ranks=ranks)
        return {
            "kept": all_columns.kept, "n": all_columns.n, "variance": float(all_columns.residual_variance()),
            "beta": all_columns.ols.tolist(), "logdet": float(all_columns.logdet_RtR),
            "orthonormal": float((ranks.sum(all_columns.U.mT @ all_columns.U) - torch.eye(all_columns.p)).abs().max()),
            "e": torch.cat(ranks.gather(all_columns.e)).tolist(), "f": float(f),
            "slopes": [torch.cat(ranks.gather(slope)).tolist() for slope in slopes],
            "refused": told(lambda: prepare_fixed_effects(y, X, "error", ranks)),
        }  # fmt: skip


def quantities(model: MixedModel, solver: str, ranks: Ranks, owner: np.ndarray, way: str) -> dict[str, Any]:
    """All that an evaluation gives, of all rows in the order of the processes, and of all levels in theirs."""
    own = SOLVERS[solver]().whole_terms(model.V) or [] if way == "levels" else []
    rows = np.flatnonzero(owner == ranks.rank) if ranks.size > 1 else np.argsort(owner, kind="stable")
    ours, places = model.part(rows, own)
    ranks = ranks.owning(places)
    y, X = ours.y.clone().requires_grad_(), ours.X.clone().requires_grad_()
    theta = torch.linspace(-0.3, 0.4, model.V.num_params, dtype=torch.float64).requires_grad_()
    evaluation = SOLVERS[solver]().prepare_shared(ours.V, y, X, ranks).evaluate(theta)
    loglik = restricted_loglik(evaluation)
    score, *slopes = torch.autograd.grad(loglik, (theta, y, X))
    columns = torch.sin(torch.arange(len(owner), dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0]))[rows]
    found: dict[str, Any] = {
        "loglik": loglik, "score": score, "AI": average_information(evaluation), "beta": beta(evaluation),
        "beta_cov": beta_cov(evaluation), "diagonal": evaluation.inner_diagonal(columns),
    }  # fmt: skip
    by_rows = {"by y": slopes[0], "by X": slopes[1], "Py": evaluation.Py,
               "solve": evaluation.solve(columns), "project": evaluation.project(columns)}  # fmt: skip
    found |= {name: torch.cat(ranks.gather(value)) for name, value in by_rows.items()}
    if solver == "blocks":
        problem = SOLVERS[solver]().prepare_shared(ours.V, ours.y, ours.X, ranks)
        found["observed"] = observed_information(problem.evaluate(theta), restricted_loglik)
    for term in random_terms(ours.V, theta.detach()):
        effects = torch.stack([blup(evaluation, term), prediction_error_variance(evaluation, term)])
        if term.name in ranks.own and ranks.size > 1:
            place = np.tile(places[term.name], effects.shape[1] // len(places[term.name]))
            parts = ranks.objects((effects.numpy(), place))
            levels = sum(len(part) for _, part in parts) * len(places[term.name]) // effects.shape[1]
            whole = np.zeros((2, effects.shape[1] // len(places[term.name]) * levels))
            for values, part in parts:
                count = len(part) * levels // whole.shape[1]
                effect = np.repeat(np.arange(len(part) // count), count)
                whole[:, effect * levels + part] = values
            effects = torch.from_numpy(whole)
        found[f"effects of {term.name}"] = effects
    rows_of_new = model.frame.iloc[:7].assign()
    new = ours.design(rows_of_new, ranks)
    found["prediction"] = torch.stack(predict(evaluation, new.X, dict(new.Z), dict(new.unseen)))
    return {name: value.detach().tolist() for name, value in found.items()}


MODELS: dict[str, Callable[[], MixedModel]] = {
    "slopes": lambda: MixedModel("sleepstudy", "Reaction ~ Days", {"Subject": Term("Subject", "1 + Days")}),
    "crossed": lambda: MixedModel("john_alpha", "yield ~ rep", ["gen", "rep:block"]),
    "serial": lambda: MixedModel(
        read_table("orthodont").iloc[3:], "distance ~ age * Sex",
        residual=Term(groups="Subject", within="occ", covariance=AR1Matrix)),
}  # fmt: skip


def trial() -> pd.DataFrame:
    """A field trial in which blocks share genotypes with few others, so that the rest is a chain."""
    generator, plots = np.random.default_rng(0), [(gen, rep) for rep in range(3) for gen in range(1200)]
    gen, rep = np.array(plots).T
    block = (gen + 7 * rep) // 8 % 150
    y = generator.normal(size=1200)[gen] + generator.normal(size=(150, 3))[block, rep] + generator.normal(size=3600)
    return pd.DataFrame({"y": y, "gen": gen.astype(str), "rep": rep.astype(str), "block": block.astype(str)})


def chain(ranks: Ranks) -> dict[str, Any]:
    """How the rest of the trial is kept, and ℓ, θ and steps of its fit."""
    model, equations = MixedModel(trial(), "y ~ rep", ["gen", "rep:block"]), SOLVERS["mixed_model_equations"]()
    fitted = CHECK.fitted(model, "REML", equations.name, "levels", ranks)
    owner = CHECK.owners(model, equations.name, "levels", ranks.size) if ranks.size > 1 else np.zeros(3600)
    part, places = model.part(np.flatnonzero(owner == ranks.rank), ["gen"])
    problem = equations.prepare_shared(part.V, part.y, part.X, ranks.owning(places))
    layout = problem.products.layout
    return {"layout": [type(layout).__name__, layout.length], "loglik": fitted.loglik, "theta": fitted.theta.tolist(),
            "steps": fitted.steps, "same": fitted.same}  # fmt: skip


FITTED = {
    "dyestuff2": ["spectral", "blocks", "mixed_model_equations"], "cake_emptycell": ["mixed_model_equations"],
    "john_alpha": ["mixed_model_equations", "dense"], "orthodont_miss": ["blocks"], "twotrait": ["spectral_traits"],
}  # fmt: skip
EVALUATED = (
    ("slopes", "blocks", "levels"), ("serial", "blocks", "levels"), ("crossed", "mixed_model_equations", "levels"),
    ("crossed", "mixed_model_equations", "rows"), ("slopes", "mixed_model_equations", "levels"),
)  # fmt: skip


def solvers() -> dict[str, Any]:
    """All of the above on four processes and on the first three of them."""
    logging.getLogger("openreml_nn").setLevel(logging.ERROR)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    three = ProcessGroup(group=groups[3]) if dist.get_rank() < 3 else None
    cases = [case for case in json.loads(CHECK.CASES.read_text()) if case["name"] in FITTED]
    with contextlib.redirect_stdout(io.StringIO()):
        folder, sizes = CHECK.CASES.parent, list(groups)
        lines = [CHECK.compare(case, folder, FITTED[case["name"]], sizes, groups, 300) for case in cases]
    found: dict[str, Any] = {"fits": [(str(row), row.short) for line in lines for row in line]}
    if three is not None:
        found["collectives"] = collectives(three)
        cuts = [0, 1, 8, 30]  # one row, fewer rows than columns, the rest
        found["fixed"] = fixed_effects(three, slice(cuts[three.rank], cuts[three.rank + 1]))
        for name, solver, way in EVALUATED:
            model = MODELS[name]()
            owner = CHECK.owners(model, solver, way, 3)
            found[f"{name} {solver} {way}"] = quantities(model, solver, three, owner, way)
            if three.rank == 0:
                found[f"{name} {solver} {way} alone"] = quantities(model, solver, ALONE, owner, way)
        found["refusals"], found["chain"] = refusals(three), chain(three)
        if three.rank == 0:
            found["fixed alone"], found["chain alone"] = fixed_effects(ALONE, slice(0, 30)), chain(ALONE)
    return found


def benchmark() -> list[dict[str, Any]]:
    """What the benchmark tells of two numbers of rows."""
    return [vars(BENCHMARK.work(rows, 10)) for rows in (2000, 20_000)]


def refusals(ranks: Ranks) -> dict[str, str]:
    """Errors that all processes raise together."""
    y, X = (part[10 * ranks.rank : 10 * ranks.rank + 10] for part in design())
    bad, last = y.clone(), ranks.rank == 2
    bad[3] = torch.nan
    levels = ["a", "a", "b"] if ranks.rank == 1 else ["a", "b", "c"]
    singular = Sum(g=CovariancePropagation(DummyMatrix(levels), ScalarMatrix(len(set(levels)))))
    problem = SOLVERS["blocks"]().prepare_shared(singular, y[:3], None, ranks.owning(["g"]))
    dense, equations = SOLVERS["dense"](), SOLVERS["mixed_model_equations"]()
    terms = {name: CovariancePropagation(DummyMatrix([0, 0, 1]), ScalarMatrix(2)) for name in ("g", "h")}
    two, both = Sum(**terms, residual=ScalarMatrix(3)), ranks.owning(["g", "h"])
    return {
        "nan": told(lambda: prepare_fixed_effects(bad if last else y, X, ranks=ranks)),
        "columns": told(lambda: prepare_fixed_effects(y, X[:, :3] if last else X, ranks=ranks)),
        "empty": told(lambda: prepare_fixed_effects(y[:0] if last else y, X[:0] if last else X, ranks=ranks)),
        "singular": told(problem.evaluate),
        "dense": told(lambda: dense.prepare_shared(singular, y[:3], None, ranks)),
        "two terms": told(lambda: equations.prepare_shared(two, y[:3], None, both)),
        "blocks for two terms": choose_shared(two, "auto", both).solver.name,
    }


# ---- Lightning -------------------------------------------------------------------------------------------------------


def as_node(port: int, nodes: int, each: int) -> Callable[[int], dict[str, str]]:
    """Environment of a process on one of several machines, as ``torchrun`` and Lightning's own launcher give it."""

    def variables(place: int) -> dict[str, str]:
        node, local = divmod(place, each)
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(nodes * each),
                 "NODE_RANK": str(node), "LOCAL_RANK": str(local)}  # fmt: skip
        return names

    return variables


class Steps(Callback):
    """Keeps θ of each step, and whether it is the same on all processes, bit by bit."""

    def __init__(self) -> None:
        self.thetas: list[list[float]] = []
        self.same = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *more: Any) -> None:
        assert isinstance(pl_module, REMLModule)
        theta = pl_module.covariance.theta.detach()
        self.thetas.append(theta.tolist())
        self.same &= all(torch.equal(theta, own) for own in processes().gather(theta))


def trainer(folder: str, nodes: int, each: int, *callbacks: Callback, **more: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "max_epochs": 100, "accelerator": "cpu", "num_nodes": nodes, "devices": each, "logger": False,
        "strategy": "ddp" if nodes * each > 1 else "auto", "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder, "log_every_n_steps": 1,
        "callbacks": [ConvergenceCallback(), ResultFiles(folder, verbose=False),
                      PredictionFiles(folder, verbose=False), *callbacks],
    }  # fmt: skip
    return L.Trainer(**options | more)


def new_rows(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A few rows, one of them of a level that is new."""
    new = table.iloc[[0, 7, 20, 50]].copy()
    new.loc[new.index[2], column] = 999_999 if pd.api.types.is_numeric_dtype(new[column]) else "new"
    return new


def lightning_fit(folder: str, nodes: int, each: int, column: str, solver: str, **data: Any) -> dict[str, Any]:
    """A fit with a Trainer, its steps, a validation and predictions."""
    new = new_rows(read_table(data["table"]), column)
    module_data = MixedModelDataModule(**data, predict_table=new, validation_table=read_table(data["table"]).iloc[:9])
    module, steps = REMLModule(module_data.covariance, solver=solver), Steps()
    run = trainer(folder, nodes, each, steps)
    run.fit(module, module_data)
    run.save_checkpoint(f"{folder}.ckpt")
    alone = module.result().summary() if run.is_global_zero else ""  # no message: the other processes do not call it
    (validated,) = run.validate(module, module_data, verbose=False)
    predicted = run.predict(module, module_data)
    assert predicted is not None
    return {
        "thetas": steps.thetas, "same": steps.same, "summary": alone, "validated": validated,
        "predicted": predicted[0][["new_levels", "prediction", "std_error"]].to_dict("list"),
        "sent": module.problem.ranks.sent, "n": len(module_data.batch.y), "loglik": module.result().loglik,
        "files": sorted(path.name for path in Path(folder).iterdir()) if run.is_global_zero else [],
        "blup": module.result().blup().to_dict("list"), "fixed": module.result().fixed_effects.to_dict("list"),
    }  # fmt: skip


def resumed(folder: str, checkpoint: Path, **data: Any) -> dict[str, Any]:
    """A fit that goes on from a checkpoint, with the data of that fit and with others."""
    table = read_table(data["table"])
    other = Path(folder) / "other.parquet"
    table.assign(Reaction=table["Reaction"] + 1.0).to_parquet(other)

    def fit(**own: Any) -> float:
        module_data = MixedModelDataModule(**data | own)
        module = REMLModule(module_data.covariance, solver="blocks")
        trainer(folder, 1, 1).fit(module, module_data, ckpt_path=str(checkpoint))
        return module.result().loglik

    return {"loglik": fit(), "other data": told(lambda: fit(table=other))}


def own_batches(folder: str) -> dict[str, Any]:
    """A user's own loaders: each process with its rows and `Batch.ranks`, without them, and with the same rows."""
    table = read_table("sleepstudy")
    model = MixedModel(table, "Reaction ~ Days", ["Subject"])

    def fit(mine: bool, says: bool) -> float | str:
        module = REMLModule(model.V, solver="blocks")
        run = trainer(folder, 1, 2, callbacks=[ConvergenceCallback()])

        class Loader:
            def __iter__(self) -> Any:
                rows = np.arange(0, 90) + 90 * run.global_rank if mine else np.arange(180)
                part, places = model.part(rows, ["Subject"] if says else [])
                ranks = ProcessGroup(places) if says else ALONE
                yield Batch(part.y, part.X, part.x_names, part.V if says else None, ranks)

            def __len__(self) -> int:
                return 1

        run.fit(module, Loader())
        return module.result().loglik

    return {"shares": fit(True, True), "same": fit(False, False), "says nothing": told(lambda: fit(True, False))}


def network(folder: str, each: int, mode: str) -> dict[str, Any]:
    """A network with a head: the clusters of each step, what was learned, and predictions from a checkpoint."""
    torch.manual_seed(0)
    codes, x = torch.arange(200) % 10, torch.randn(200, 3)
    y = x.sum(1) + torch.randn(10)[codes] + 0.3 * torch.randn(200)
    rows = TensorDataset(x, y, codes)
    module = MixedModelRegressor(torch.nn.Linear(3, 1), MixedModelHead({"a": Effects(10)}, mode=mode), refit=True)
    seen: list[list[int]] = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
            seen.append(batch[2].unique().tolist())

    path = Path(folder) / "network.ckpt"
    run = trainer(folder, 1, each, callbacks=[Seen()], max_epochs=2, use_distributed_sampler=False)
    by_clusters = DataLoader(rows, batch_sampler=ClusterBatchSampler(codes, 40))
    whole = DataLoader([(x, y, codes)], batch_size=None)  # type: ignore[arg-type]
    run.fit(module, whole if mode == "exact" else by_clusters, DataLoader(rows, batch_size=50))
    run.save_checkpoint(path)
    other = MixedModelRegressor(torch.nn.Linear(3, 1), MixedModelHead({"a": Effects(10)}))
    other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        mean, variance = other.head.predict(other(x[:3]), torch.tensor([0, 1, -1]))
    assert module.result is not None
    assert variance is not None
    return {"seen": seen, "weight": module.network.weight.tolist(), "loglik": module.result.loglik,
            "mse": run.callback_metrics["val/mse"].item(), "mean": mean.tolist(),
            "variance": variance.tolist()}  # fmt: skip


def command(options: list[str], file: Callable[[int], str] | None = None) -> dict[str, Any]:
    """Exit code and messages of the command line, each process with a table of its own if there are several."""
    out, place = io.StringIO(), int(os.environ.get("LOCAL_RANK", 0))
    given = ["--data.table", file(place)] if file else []
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        try:
            cli.main(["fit", *options, *given, "--trainer.logger", "false", "--trainer.strategy", "ddp",
                      "--trainer.accelerator", "cpu"])  # fmt: skip
        except SystemExit as end:
            return {"code": end.code, "said": out.getvalue()}
    return {"code": 0, "said": out.getvalue()}


def mistakes(folder: Path) -> dict[str, tuple[list[str], Callable[[int], str] | None]]:
    """Commands that must fail on two processes together."""
    table = read_table("sleepstudy")
    lacking, text = table.copy(), table.assign(Reaction=table["Reaction"].astype(str))
    lacking.loc[100, "Reaction"] = np.nan
    for name, own in {"whole": table, "lacking": lacking, "text": text, "one": table.iloc[:1]}.items():
        own.to_parquet(folder / f"{name}.parquet", row_group_size=30)
    share = ["--data.fixed", "Reaction ~ Days", "--data.random", "[Subject]", "--data.read", "share",
             "--trainer.devices", "2", "--trainer.default_root_dir", str(folder)]  # fmt: skip

    def either(first: str, second: str) -> Callable[[int], str]:
        return lambda place: str(folder / (second if place else first))

    return {
        "a missing value": (share, either("lacking.parquet", "lacking.parquet")),
        "other types": (share, either("whole.parquet", "text.parquet")),
        "more processes than rows": (share, either("one.parquet", "one.parquet")),
    }


ALPHA: dict[str, Any] = {"table": "john_alpha", "fixed": "yield ~ rep", "random": ["gen", "rep:block"]}


def main(file: str) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {"solvers": PROCESSES.on_processes(4, solvers, timeout=60.0)}
    found["benchmark"] = PROCESSES.on_processes(2, benchmark, timeout=60.0)

    def run(nodes: int, each: int, work: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        def called() -> Any:
            return work(*arguments, **named)

        environment = as_node(PROCESSES.free_port(), nodes, each) if nodes * each > 1 else None
        return PROCESSES.on_processes(nodes * each, called, group=False, timeout=60.0, environment=environment)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shuffled = read_table("sleepstudy").iloc[1:].sample(frac=1.0, random_state=1)  # the first subject has 9 rows
        shuffled.to_parquet(folder / "sleep.parquet", row_group_size=25)
        sleep: dict[str, Any] = {"table": folder / "sleep.parquet", "fixed": "Reaction ~ Days",
                                 "random": {"Subject": Term("Subject", "1 + Days")}}  # fmt: skip
        fits = {
            "two machines": (2, 1, "gen", "auto", ALPHA),
            "dense": (1, 2, "gen", "dense", ALPHA),
            "row groups": (1, 3, "Subject", "blocks", sleep | {"read": "share"}),
        }
        alone = {
            "alpha": (1, 1, "gen", "auto", ALPHA),
            "alpha dense": (1, 1, "gen", "dense", ALPHA),
            "sleep": (1, 1, "Subject", "blocks", sleep),
        }
        for key in [*fits, *alone]:
            (folder / key).mkdir()
        for key, (nodes, each, column, solver, data) in fits.items():
            found[key] = run(nodes, each, lightning_fit, str(folder / key), nodes, each, column, solver, **data)
        found |= run(1, 1, lambda: {key: [lightning_fit(str(folder / key), nodes, each, column, solver, **data)]
                                    for key, (nodes, each, column, solver, data) in alone.items()})[0]  # fmt: skip
        share = sleep | {"read": "share"}
        found["resumed"] = run(1, 1, resumed, name, folder / "row groups.ckpt", **share)
        found["own batches"] = run(1, 2, own_batches, name)
        found["network"] = run(1, 2, network, name, 2, "batch")
        found["network exact"] = run(1, 2, network, name, 2, "exact")
        found["network exact alone"] = run(1, 1, network, name, 1, "exact")
        commands = mistakes(folder)
        told = run(1, 2, lambda: {key: command(*given) for key, given in commands.items()})
        found |= {key: [own[key] for own in told] for key in told[0]}
    Path(file).write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
