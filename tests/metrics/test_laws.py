"""Laws of every metric: batches, processes and copies give what the function gives on all rows at once.

Run as a program, with the name of a file, this is the other one of the two processes of `test_two_processes`.
"""

import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import MeanSquaredError

from openreml_nn import metrics
from openreml_nn.metrics import functional

N = 40
BATCHES = [0, 1, 2, 17, N]  # of one row, of one row, of fifteen and of twenty-three


def table() -> dict[str, Tensor]:
    """Predictions of rows far from zero, with variances of their own."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(7, N, generator=generator, dtype=torch.float64)
    return {
        "fixed": 1e8 + normal[0],
        "random_variance": normal[1].square(),
        "residual_variance": normal[2].square() + 0.1,
        "preds": 1e8 + normal[3],
        "target": 1e8 + 2.0 * normal[4],
        "variance": normal[5].square() + 0.5,
        "known": normal[6] > 0.0,
        "loss": normal[0] + 3.0,
        "rows": torch.arange(N),
    }


def ratio(numerator: list[float], estimates: Tensor) -> Tensor:
    return functional.variance_ratio(estimates, numerator, [1.0, 1.0])


DATA = table()
PREDICTED = ("preds", "target", "variance", "known")
VARIANCES = ("fixed", "random_variance", "residual_variance")
NEW, KNOWN = ({name: DATA[name][mask] for name in PREDICTED[:3]} for mask in (~DATA["known"], DATA["known"]))
ALL = {name: DATA[name] for name in PREDICTED[:3]}

# a metric, what its updates take, and its value on all rows
CASES: dict[str, tuple[Callable[..., Metric], tuple[str, ...], Tensor]] = {
    "marginal": (metrics.MarginalR2, VARIANCES, functional.marginal_r2(*(DATA[name] for name in VARIANCES))),
    "conditional": (metrics.ConditionalR2, VARIANCES, functional.conditional_r2(*(DATA[name] for name in VARIANCES))),
    "biased": (
        functools.partial(metrics.MarginalR2, correction=0),
        VARIANCES,
        functional.marginal_r2(*(DATA[name] for name in VARIANCES), correction=0),
    ),
    "icc": (
        metrics.IntraclassCorrelation,
        VARIANCES[1:],
        functional.intraclass_correlation(*(DATA[name] for name in VARIANCES[1:])),
    ),
    "likelihood": (
        metrics.NegativeLogLikelihoodPerRow,
        ("loss", "rows"),
        functional.negative_loglik_per_row(DATA["loss"], DATA["rows"]),
    ),
    "density": (metrics.NegativeLogPredictiveDensity, PREDICTED, functional.negative_log_predictive_density(**ALL)),
    "density of new": (
        functools.partial(metrics.NegativeLogPredictiveDensity, rows="new"),
        PREDICTED,
        functional.negative_log_predictive_density(**NEW),
    ),
    "density of known": (
        functools.partial(metrics.NegativeLogPredictiveDensity, rows="known"),
        PREDICTED,
        functional.negative_log_predictive_density(**KNOWN),
    ),
    "coverage": (metrics.IntervalCoverage, PREDICTED, functional.interval_coverage(**ALL)),
    "coverage of new": (
        functools.partial(metrics.IntervalCoverage, level=0.5, rows="new"),
        PREDICTED,
        functional.interval_coverage(**NEW, level=0.5),
    ),
    "width": (metrics.IntervalWidth, PREDICTED[2:], functional.interval_width(DATA["variance"])),
    "width of known": (
        functools.partial(metrics.IntervalWidth, level=0.5, rows="known"),
        PREDICTED[2:],
        functional.interval_width(KNOWN["variance"], level=0.5),
    ),
}
FITS = [(torch.tensor([1.0, 2.0 + i], dtype=torch.float64), torch.diag(torch.tensor([0.1, 0.2 * i]))) for i in range(4)]
POOLED = torch.tensor([1.0, 3.5], dtype=torch.float64)
TOTAL = torch.diag(torch.tensor([0.1, 0.3 + 1.25 * 5.0 / 3.0], dtype=torch.float64))  # W + (1 + 1/m) B, B = 5/3
FIT_CASES: dict[str, tuple[Callable[..., Metric], Tensor]] = {
    "ratio": (functools.partial(metrics.VarianceRatio, [1, 0], [1, 1]), torch.tensor(1 / 4.5, dtype=torch.float64)),
    "its error": (
        functools.partial(metrics.VarianceRatio, [1, 0], [1, 1], standard_error=True),
        functional.delta_method(functools.partial(ratio, [1.0, 0.0]), POOLED, TOTAL)[1],
    ),
    "function": (
        functools.partial(metrics.FunctionOfEstimates, functools.partial(ratio, [0.0, 1.0]), 2),
        torch.tensor(3.5 / 4.5, dtype=torch.float64),
    ),
}


def batches(names: tuple[str, ...], bounds: list[int] = BATCHES) -> list[dict[str, Tensor]]:
    return [{n: DATA[n][a:b] for n in names} for a, b in pairwise(bounds)]


def updates(case: str) -> tuple[Callable[..., Metric], list[dict[str, Tensor]], Tensor]:
    """A metric of either table, the arguments of its updates, and its value."""
    if case in CASES:
        make, names, expected = CASES[case]
        return make, batches(names), expected
    make, expected = FIT_CASES[case]
    return make, [{"estimates": theta, "covariance": C} for theta, C in FITS], expected


every = pytest.mark.parametrize("case", [*CASES, *FIT_CASES])


def close(got: Any, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-7 if expected < 1 else 1e-12, atol=0.0)


@every
def test_batches(case: str) -> None:
    make, parts, expected = updates(case)
    metric = make()
    for part in parts:
        metric.update(**part)
    close(metric.compute(), expected)
    metric.reset()
    for part in reversed(parts):
        metric.update(**part)
    close(metric.compute(), expected)


@every
def test_forward_gives_the_batch_and_adds_it(case: str) -> None:
    make, parts, expected = updates(case)
    metric = make()
    for part in parts[::-1]:
        alone = make()
        alone.update(**part)
        torch.testing.assert_close(metric(**part), alone.compute(), equal_nan=True)
    close(metric.compute(), expected)


@every
def test_merged_states(case: str) -> None:
    make, parts, expected = updates(case)
    whole, other = make(), make()
    for part in parts[:1]:
        other.update(**part)
    for part in parts[1:]:
        whole.update(**part)
    whole.merge_state(other)
    close(whole.compute(), expected)
    other.merge_state(make().metric_state)  # nothing
    for part in parts[1:]:
        other.update(**part)
    close(other.compute(), expected)


@every
def test_pickled_and_cloned_in_between(case: str) -> None:
    make, parts, expected = updates(case)
    metric = make()
    for part in parts:
        metric.update(**part)
        metric = pickle.loads(pickle.dumps(metric)).clone()
    close(metric.compute(), expected)


@every
def test_casts_of_a_module_leave_the_states_exact(case: str) -> None:
    make, parts, expected = updates(case)
    module = torch.nn.ModuleDict({"metric": make()})
    for cast in (module.half, module.float, lambda: module.to(torch.bfloat16), lambda: module.to("cpu")):
        cast()
    metric: Any = module["metric"]
    for part in parts:
        metric.update(**part)
        module.to(torch.float16)
    close(metric.compute(), expected)
    metric.reset()
    assert all(state.dtype == torch.float64 for state in metric.metric_state.values())
    metric.set_dtype(torch.float32)
    assert all(state.dtype == torch.float32 for state in metric.metric_state.values())


@every
def test_float32_input(case: str) -> None:
    """Numbers of another type are converted before anything is computed."""
    make, parts, _ = updates(case)
    short, full = make(), make()
    for part in parts:
        rounded = {n: v.float() if v.is_floating_point() else v for n, v in part.items()}
        short.update(**rounded)
        full.update(**{n: v.double() if v.is_floating_point() else v for n, v in rounded.items()})
    assert short.compute().dtype == torch.float64
    torch.testing.assert_close(short.compute(), full.compute(), rtol=0.0, atol=0.0)


@every
def test_compute_without_data(case: str) -> None:
    make, parts, _ = updates(case)
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="needs data"):
        make().compute()
    if case in CASES:
        metric = make()
        metric.update(**{name: values[:0] for name, values in parts[0].items()})
        assert metric.compute().isnan()


@every
def test_inference_mode(case: str) -> None:
    make, parts, expected = updates(case)
    metric = make()
    with torch.inference_mode():
        for part in parts:
            metric(**part)
        close(metric.compute(), expected)


@every
def test_plot(case: str) -> None:
    import matplotlib.pyplot as plt

    make, parts, _ = updates(case)
    metric = make()
    for part in parts:
        metric.update(**part)
    figure, _ = metric.plot()
    plt.close(figure)


def test_one_collection_of_all() -> None:
    """Metrics that share a state in a collection are those that have the same, whatever the first batch holds."""
    for first in (DATA["known"], ~DATA["known"], DATA["known"] | ~DATA["known"]):
        order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
        collection = MetricCollection({name.replace(" ", "_"): make() for name, (make, *_) in CASES.items()})
        collection.add_metrics({"mse": MeanSquaredError()})
        cut = int(first.sum())
        for rows in (order[:cut], order[cut:]):
            collection.update(**{name: values[rows] for name, values in DATA.items()})
        values = collection.compute()
        for name, (_, _, expected) in CASES.items():
            close(values[name.replace(" ", "_")], expected)
        groups = [set(group) for group in collection.compute_groups.values()]
        assert {"marginal", "conditional", "biased"} in groups
        assert {"density", "density_of_new", "density_of_known"} in groups
        assert {"width", "width_of_known"} in groups
        assert {"coverage"} in groups


def test_collection_of_ratios_of_equal_components() -> None:
    """At a start with equal variances all ratios are equal; they are no longer so when the estimates differ."""
    weights = ([1, 0, 0], [0, 1, 0])
    collection = MetricCollection({f"h{i}": metrics.VarianceRatio(a, [1, 1, 1]) for i, a in enumerate(weights)})
    collection.update(torch.ones(3))
    collection.update(torch.tensor([1.0, 5.0, 0.0]))
    assert {name: float(value) for name, value in collection.compute().items()} == {"h0": 1 / 4.5, "h1": 3 / 4.5}


def test_coverages_at_two_levels_do_not_merge() -> None:
    with pytest.raises(ValueError, match="Expected state variable"):
        metrics.IntervalCoverage(level=0.5).merge_state(metrics.IntervalCoverage(level=0.9))


def test_sums_and_differences_of_metrics() -> None:
    unadjusted = metrics.ConditionalR2() - metrics.MarginalR2()
    for part in batches(VARIANCES):
        unadjusted.update(**part)
    close(unadjusted.compute(), CASES["conditional"][2] - CASES["marginal"][2])


def test_gradients() -> None:
    for case in ("marginal", "density", "width", "likelihood", "ratio"):
        make, parts, _ = updates(case)
        part = {n: v.clone().requires_grad_(v.is_floating_point() and n != "covariance") for n, v in parts[-1].items()}
        make()(**part).backward()
        leaves = [v for v in part.values() if v.requires_grad]
        assert any(bool((v.grad != 0).any()) for v in leaves if v.grad is not None)


@every
def test_on_another_device(case: str, another_device: Callable[[], AbstractContextManager[torch.device]]) -> None:
    make, parts, expected = updates(case)
    with another_device() as device:
        metric = make().to(device)
        for part in parts:
            metric(**{name: values.to(device) for name, values in part.items()})
        assert metric.compute().device == device
        close(metric.compute().cpu(), expected)


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    """One process has the first batch, the other one the rest; both compute the value of all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(metrics.__file__).parents[2])}
    command = [sys.executable, __file__, str(tmp_path / "store")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
        try:
            here = one_of_two(0, str(tmp_path / "store"))
            there = json.loads(other.communicate(timeout=60)[0])
        finally:
            other.kill()
    for values in (here, there):
        for case in (*CASES, *FIT_CASES):
            close(torch.tensor(values[case], dtype=torch.float64), updates(case)[2])
        close(torch.tensor(values["idle"], dtype=torch.float64), CASES["marginal"][2])


def one_of_two(rank: int, store: str) -> dict[str, float]:
    """The values that a process computes together with another one."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    try:
        values = {}
        for case in (*CASES, *FIT_CASES):
            make, parts, _ = updates(case)
            metric = make()
            for part in parts[1:] if rank else parts[:1]:
                metric.update(**part)
            values[case] = metric.compute().item()
        idle = metrics.MarginalR2()
        for part in batches(VARIANCES) if rank == 0 else []:
            idle.update(**part)
        values["idle"] = idle.compute().item()  # the other process has nothing to add
        return values
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(one_of_two(1, sys.argv[1])))
