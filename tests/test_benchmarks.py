"""The benchmark scripts run: their help, and one tiny workload of this project alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def run(script: str, *arguments: str) -> str:
    """What a script prints; fails where its exit code is not 0."""
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "script", ["benchmark_peers.py", "benchmark_scaling.py", "benchmark_dense.py", "benchmark_head.py"]
)
def test_help(script: str) -> None:
    assert "--threads" in run(script, "--help")


def test_alpha_lattice_where_the_peer_is_not_installed(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    said = run("benchmark_peers.py", "--workload", "alpha", "--small", "--repeats", "1", "--threads", "1",
               "--peers", "mixedlm", "--peers-python", str(tmp_path / "python"), "--json", str(file))  # fmt: skip
    assert "mixed_model_equations" in said
    assert any(line.startswith("mixedlm") and "not installed" in line for line in said.splitlines())
    (written,) = json.loads(file.read_text())
    arrays, table, _ = written["outcomes"]
    assert arrays["seconds"]
    assert table["variances"] == pytest.approx(arrays["variances"], rel=1e-8)


def test_scaling_of_one_solver() -> None:
    said = run("benchmark_scaling.py", "--solver", "spectral", "--small", "--repeats", "1", "--threads", "1")
    assert "exponent" in said


def test_every_variant_of_a_head() -> None:
    said = run("benchmark_head.py", "--small", "--epochs", "1").splitlines()
    assert [line.split("  ")[0] for line in said[:5]] == ["no head", "intercepts", "curves", "features", "crossed"]
