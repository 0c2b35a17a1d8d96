"""Each example runs as it stands and prints what it says."""

import contextlib
import io
import runpy
from pathlib import Path

import pytest

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


def test_every_example_is_expected() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    for line in EXPECTED[name]:
        assert line in printed.getvalue()
