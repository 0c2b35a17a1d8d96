"""Every small reference case, through the script that a reader runs: structured form → model → fit → comparison."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "references"
CASES = json.loads((FOLDER / "cases.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_references", ROOT / "scripts" / "check_references.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_fit_matches_other_programs(case: dict, script: ModuleType) -> None:
    errors, result = script.check(case, FOLDER, "dense")
    assert result.converged, result.reason
    tolerances = script.needed(case)
    short = {name: error for name, error in errors.items() if error > tolerances[name]}
    assert not short
    assert {"loglik", "variance", "beta", "se"} <= errors.keys()


@pytest.mark.parametrize("case", [case for case in CASES if "boundary" in case], ids=lambda case: case["name"])
def test_boundary_is_reported(case: dict, script: ModuleType) -> None:
    _, result = script.check(case, FOLDER, "dense")
    table = result.variance
    at_zero = table[table["boundary"]]
    assert len(at_zero) == len(case["boundary"])
    assert (at_zero["estimate"] == 0.0).all()
    assert at_zero["std_error"].isna().all()
    assert "boundary" in result.summary()


def test_exit_code_when_a_case_falls_short(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    wrong = json.loads((FOLDER / "cases.json").read_text().replace("../../openreml_nn", str(ROOT / "openreml_nn")))
    case = next(c for c in wrong if c["name"] == "dyestuff")
    case["reference"]["loglik"] += 1e-3
    other = next(c for c in wrong if c["name"] == "penicillin")
    (tmp_path / "cases.json").write_text(json.dumps([case, other]))
    monkeypatch.setattr(sys, "argv", ["check_references.py", "--cases", str(tmp_path / "cases.json")])
    assert script.main() == 1
    printed = capsys.readouterr().out
    assert "1 passed, 1 short: dyestuff" in printed
    assert "penicillin" in printed
