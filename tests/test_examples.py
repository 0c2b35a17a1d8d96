"""Each example runs as it stands, or on a small table, and prints what it says."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.nn import Effects, MixedModelHead

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPECTED = {
    "adam_loop.py": ["log-likelihood -46.5969", "gen/sigma^2        0.1429", "residual/sigma^2   0.0816"],
    "lbfgs_loop.py": [
        "LBFGS                log-likelihood -46.5969",
        "AverageInformation   log-likelihood -46.5969 in ",
        "steps: the score is zero",
        "rep:block/sigma^2  0.0702",
    ],
    "own_structure.py": ["Converged after", "walk/sigma^2", "noise/sigma^2"],
}
WITH_OPTIONS = {"lmmnn_simulation.py", "insteval_folds.py", "reml_against_ml.py"}
SMALL = ["--rows", "800", "--epochs", "2", "--repetitions", "1"]


def printed(name: str, *options: str) -> str:
    """What an example prints when it is called with options."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [name, *options])
        patch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return out.getvalue()


def test_every_example_is_expected() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED) | WITH_OPTIONS


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str) -> None:
    found = printed(name)
    for line in EXPECTED[name]:
        assert line in found


@pytest.mark.filterwarnings("ignore:The fit did not converge")  # of six parameters to 80 subjects
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--tables", "modes", "--only", "q=1000 "], 4),
        (["--tables", "one", "--only", "q=100 sigma2=10", "--methods", "one-hot", "embedding"], 2),
        (["--tables", "two", "--only", "True", "--methods", "embedding", "alternating"], 2),
        (["--tables", "longitudinal", "--only", "+3 t=own", "--methods", "floor", "batch"], 4),
        (["--tables", "papers", "--only", "q=1000 sigma2=10", "--methods", "batch"], 2),
    ],
)
def test_lmmnn_simulation(options: list[str], rows: int, tmp_path: Path) -> None:
    options = ["--run", *options, *SMALL, "--results", str(tmp_path / "results.csv")]
    first, again = printed("lmmnn_simulation.py", *options), printed("lmmnn_simulation.py", *options)
    assert len(pd.read_csv(tmp_path / "results.csv")) == rows
    assert first.endswith(again)  # nothing is run twice
    assert again.count("(1)") == rows


def test_committed_results_are_printed() -> None:
    found = printed("lmmnn_simulation.py")
    assert "LMMNN publ." in found
    assert "Run: 20" in found  # date, versions and machine


def test_backfitting_is_the_blup_and_maximum_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from lmmnn.backfitting import Backfitting

    torch.manual_seed(0)
    levels, n = (200, 150), 3000
    codes = [torch.randint(q, (n,)) for q in levels]
    b = [1.5 * torch.randn(q, dtype=torch.float64) for q in levels]
    r = sum(own[code] for own, code in zip(b, codes, strict=True)) + torch.randn(n, dtype=torch.float64)
    head = MixedModelHead({f"z{i}": Effects(q) for i, q in enumerate(levels)})
    groups = dict(zip(head.effects, codes, strict=True))
    head.condition(torch.zeros(n), r, groups, variances=False)
    found = Backfitting(codes, levels)
    found.update(r, sweeps=300)
    torch.testing.assert_close(torch.cat(found.effects), head.posterior.effects)

    values = []
    for _ in range(60):
        found.update(r)
        values.append([*found.sigma2, found.residual])
    head.refit(torch.zeros(n), r, groups, variances=False)
    np.testing.assert_allclose(np.mean(values[10:], axis=0), list(head.variance().values()), rtol=0.03)


def test_insteval_folds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"s": 9, "d": 7, "studage": 4, "lectage": 6, "service": 2, "dept": 5}
    table = pd.DataFrame({name: rng.integers(levels, size=200) for name, levels in columns.items()})
    table.assign(y=table.service + rng.standard_normal(200)).to_csv(tmp_path / "table.csv", index=False)
    assert "network, crossed effects" in printed("insteval_folds.py", str(tmp_path / "table.csv"), "--steps", "3")


def test_reml_against_ml() -> None:
    found = printed("reml_against_ml.py", "--rows", "100", "--steps", "2", "--repetitions", "1", "--shares", "0.2")
    assert "| 0.2 |" in found
