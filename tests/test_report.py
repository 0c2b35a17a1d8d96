"""Files of a fit: what they hold, and that none is ever half written."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import FitResult, fit
from openreml_nn.covariance import ScalarMatrix
from openreml_nn.data import MixedModel
from openreml_nn.report import FILES, fit_record, write_result, write_text


@pytest.fixture(scope="module")
def result() -> FitResult:
    model = MixedModel("dyestuff", "Yield ~ 1", random=["Batch"])
    return fit(model.V, model.y, model.X, x_names=model.x_names)


def test_files(result: FitResult, tmp_path: Path) -> None:
    paths = write_result(result, tmp_path / "new" / "folder")
    assert [p.name for p in paths] == list(FILES)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES)
    variance = pd.read_csv(paths[0])
    pd.testing.assert_frame_equal(variance, result.variance)
    pd.testing.assert_frame_equal(pd.read_csv(paths[1]), result.fixed_effects)
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), result.blup())


def test_record(result: FitResult, tmp_path: Path) -> None:
    record = json.loads(write_result(result, tmp_path)[-1].read_text())
    assert record == json.loads(json.dumps(fit_record(result)))
    assert record["loglik"] == pytest.approx(-159.82713842112872, abs=1e-8)
    expected = {"method": "REML", "n": 30, "p": 1, "converged": True, "aliased": [], "iterations": result.n_iter}
    assert {key: record[key] for key in expected} == expected
    assert record["reason"] == "the score is zero"
    assert record["seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"].keys() >= {"python", "openreml_nn", "torch", "lightning", "numpy", "pandas"}


def test_nothing_that_is_not_json(tmp_path: Path) -> None:
    """A result without a time, on no parameter: still valid JSON, without NaN."""
    V = ScalarMatrix(4)
    V.set_no_grad([0])
    fixed = fit(V, torch.tensor([1.0, 2.0, 4.0, 3.0]))
    paths = write_result(fixed, tmp_path)

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    json.loads(paths[-1].read_text(), parse_constant=refuse)
    assert np.isnan(pd.read_csv(paths[0])["std_error"][0])
    assert pd.read_csv(paths[2]).empty


def test_numbers_survive_the_file(result: FitResult, tmp_path: Path) -> None:
    table = pd.read_csv(write_result(result, tmp_path)[0])
    assert table["estimate"].tolist() == result.variance["estimate"].tolist()


def test_writing_again_replaces(result: FitResult, tmp_path: Path) -> None:
    write_result(result, tmp_path)
    write_result(result, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)


def test_an_old_file_outlives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "fit.json", "old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("replace", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["fit.json"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "fit.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_cannot_be_made_writes_no_file(
    result: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FitResult, "blup", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_result(result, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf_8_and_readable_by_others(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.csv", "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
