"""Every small reference case, through the script that a reader runs: structured form → model → fit → comparison."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from openreml_nn.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "references"
CASES = json.loads((FOLDER / "cases.json").read_text())
NAMES = [case["name"] for case in CASES]
ONE_TERM = {"dyestuff", "dyestuff2", "harvey_sire", "ratpup", "nist_sirstv", "nist_smls01", "nist_smls07"}
KERNEL = {"animal200", "gblup150", "mrode31_fixed"}
TRAITS = {"twotrait", "mrode51_fixed"}
CROSSED = {"penicillin", "john_alpha"}
SPATIAL = {"wheat2_gau", "ar1ar1_sim", "slatehall_ar1ar1"}
NO_SIMPLE_RESIDUAL = {"orthodont_cs", "orthodont_symm", "orthodont_varident", "ovary_ar1", "ovary_ri_ar1", "fa1",
                      "fa1_heywood", "slatehall_ar1ar1"}  # fmt: skip
TAKEN = {
    "spectral": ONE_TERM | KERNEL,
    "spectral_traits": TRAITS,
    "mixed_model_equations": set(NAMES) - NO_SIMPLE_RESIDUAL - TRAITS,
    "blocks": set(NAMES) - KERNEL - TRAITS - CROSSED - SPATIAL,
    "dense": set(NAMES),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_references", ROOT / "scripts" / "check_references.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_which_solvers_take_a_case(name: str, script: ModuleType) -> None:
    V = script.build(CASES[NAMES.index(name)], FOLDER).data.V
    taking = {solver for solver, kind in SOLVERS.items() if kind().refusal(V) is None}
    assert taking == {solver for solver in TAKEN if name in TAKEN[solver]}


@pytest.mark.parametrize(("solver", "name"), [(solver, name) for solver in TAKEN for name in sorted(TAKEN[solver])])
def test_fit_matches_other_programs(solver: str, name: str, script: ModuleType) -> None:
    case = CASES[NAMES.index(name)]
    errors, result = script.check(case, FOLDER, solver)
    assert result.converged, result.reason
    tolerances = script.needed(case)
    assert not {quantity: error for quantity, error in errors.items() if error > tolerances[quantity]}
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
    assert run(script, monkeypatch, "--cases", str(tmp_path / "cases.json")) == 1
    printed = capsys.readouterr().out
    assert "1 passed, 1 short (dyestuff)" in printed
    assert "penicillin" in printed


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_references.py", *arguments])
    return script.main()


def test_a_case_that_a_solver_cannot_take(script: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    cases = ["--cases", str(FOLDER / "cases.json"), "--only", "dyestuff", "penicillin"]
    assert run(script, monkeypatch, *cases, "--solver", "spectral") == 0
    printed = capsys.readouterr().out
    assert "penicillin             144 cannot take: it needs one term Z G Z' and one residual" in printed
    assert "1 passed, 0 short, 1 cannot take" in printed


def test_all_solvers(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["--cases", str(FOLDER / "cases.json"), "--only", "dyestuff", "pastes", "--most-rows", "50"]
    assert run(script, monkeypatch, *cases, "--solver", "all") == 0
    printed = capsys.readouterr().out
    assert "auto: 2 passed, 0 short" in printed
    assert "spectral: 1 passed, 0 short, 1 cannot take" in printed
    assert "dense: 1 passed, 0 short, 1 left out" in printed
