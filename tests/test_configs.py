"""Each file in `configs/` runs as it is, and gives the fit that it should."""

import json
from pathlib import Path

import pytest

from openreml_nn import fit
from openreml_nn.cli import main
from openreml_nn.covariance import AR1Matrix, Matrix
from openreml_nn.data import MixedModel, Term

HERE = Path(__file__).parent
NETWORKS = {"regressor"}  # run by lightning/test_commands.py
CONFIGS = [path for path in sorted((HERE.parent / "configs").glob("*.yaml")) if path.stem not in NETWORKS]
CASES = {case["name"]: case for case in json.loads((HERE / "references" / "cases.json").read_text())}
PUBLISHED = {"john_alpha": "john_alpha", "sleepstudy": "sleepstudy_us", "gblup": "gblup150"}


def own(name: str) -> float:
    """The log-likelihood by `openreml_nn.fit`, for configurations without a published one."""
    model = {
        "oats": lambda: MixedModel("oats", "yield ~ nitro * Variety", ["Block", "Block:Variety"]),
        "orthodont_ar1": lambda: MixedModel(
            "orthodont", "distance ~ age * Sex", residual=Term("Subject", within="occ", covariance=AR1Matrix)
        ),
    }[name]()
    V: Matrix = model.V
    return fit(V, model.y, model.X).loglik


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(config)])
    record = json.loads((tmp_path / "runs" / config.stem / "version_0" / "fit.json").read_text())
    assert record["converged"] is True
    case = CASES.get(PUBLISHED.get(config.stem, ""))
    expected = own(config.stem) if case is None else case["reference"]["loglik"]
    assert record["loglik"] == pytest.approx(expected, rel=1e-8)
    assert "error" not in capsys.readouterr().err


def test_all_are_here():
    assert {config.stem for config in CONFIGS} == {"john_alpha", "sleepstudy", "oats", "orthodont_ar1", "gblup"}
