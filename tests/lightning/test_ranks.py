"""A Trainer on several processes and machines: the same fit, files of the first process, errors of all together."""

import math
from typing import Any

import numpy as np
import pytest

PAIRS = [("two machines", "alpha"), ("dense", "alpha dense"), ("row groups", "sleep")]


@pytest.mark.parametrize(("several", "one"), PAIRS)
def test_same_fit(on_processes: dict[str, Any], several: str, one: str) -> None:
    (alone,) = on_processes[one]
    for own in on_processes[several]:
        assert own["same"]  # θ of each step, bit by bit
        assert len(own["thetas"]) == len(alone["thetas"])
        assert own["thetas"] == on_processes[several][0]["thetas"]
        np.testing.assert_allclose(own["thetas"], alone["thetas"], rtol=0, atol=1e-8)
        assert own["loglik"] == pytest.approx(alone["loglik"], rel=1e-10)
        assert own["fixed"]["name"] == alone["fixed"]["name"]
        np.testing.assert_allclose(own["fixed"]["estimate"], alone["fixed"]["estimate"], rtol=1e-9)
        np.testing.assert_allclose(own["fixed"]["std_error"], alone["fixed"]["std_error"], rtol=1e-9)


@pytest.mark.parametrize(("several", "one"), PAIRS)
def test_the_first_process_has_all_levels_and_writes(on_processes: dict[str, Any], several: str, one: str) -> None:
    (alone,), (first, *others) = on_processes[one], on_processes[several]
    assert first["blup"].keys() == alone["blup"].keys()
    for column in ("term", "effect", "level"):
        assert first["blup"][column] == alone["blup"][column]
    for column in ("blup", "pev"):
        np.testing.assert_allclose(first["blup"][column], alone["blup"][column], rtol=1e-8)
    assert first["files"] == ["fit.json", "fixed_effects.csv", "predictions.csv", "random_effects.csv",
                              "variance_parameters.csv"]  # fmt: skip
    assert first["summary"].splitlines()[4:] == alone["summary"].splitlines()[3:]
    assert not any(own["files"] or own["summary"] for own in others)


@pytest.mark.parametrize(("several", "one"), PAIRS)
def test_predictions_and_validation(on_processes: dict[str, Any], several: str, one: str) -> None:
    (alone,) = on_processes[one]
    for own in on_processes[several]:
        assert own["predicted"]["new_levels"] == alone["predicted"]["new_levels"]
        assert sum(map(bool, own["predicted"]["new_levels"])) == 1
        for column in ("prediction", "std_error"):
            np.testing.assert_allclose(own["predicted"][column], alone["predicted"][column], rtol=1e-9)
        assert own["validated"].keys() == alone["validated"].keys()
        for name in ("fit/loglik", "val/rmse", "val/nlpd"):
            assert own["validated"][name] == pytest.approx(alone["validated"][name], rel=1e-9)


def test_what_is_said_of_sharing(on_processes: dict[str, Any]) -> None:
    lines = {key: on_processes[key][0]["summary"].splitlines()[2] for key, _ in PAIRS}
    assert lines == {
        "two machines": "2 processes; 36 + 36 rows by gen",
        "dense": "2 processes; each has all 72 rows, which the dense solver needs together",
        "row groups": "3 processes; 59 + 60 + 60 rows by Subject",
    }
    assert [own["n"] for own in on_processes["two machines"]] == [36, 36]
    assert [own["n"] for own in on_processes["row groups"]] == [59, 60, 60]


def test_goes_on_from_a_checkpoint_of_more_processes(on_processes: dict[str, Any]) -> None:
    (own,) = on_processes["resumed"]
    assert own["loglik"] == pytest.approx(on_processes["sleep"][0]["loglik"], rel=1e-10)
    assert "of a fit to other data: the response and the rows differ" in own["other data"]


def test_batches_of_a_user(on_processes: dict[str, Any]) -> None:
    for own in on_processes["own batches"]:
        assert own["shares"] == pytest.approx(own["same"], rel=1e-12)
        assert math.isclose(own["same"], -893.2325, abs_tol=1e-4)  # lme4: REML criterion 1786.4651
        assert "Process 2 of 2 has other data than process 1: the response differs" in own["says nothing"]


def test_a_network_in_batches(on_processes: dict[str, Any]) -> None:
    """Whole clusters, each on one process in an epoch; the same network, refit and checkpoint on both."""
    first, second = on_processes["network"]
    for epoch in (slice(0, 3), slice(3, 6)):
        clusters = [code for own in (first, second) for step in own["seen"][epoch] for code in step]
        assert sorted(clusters) == list(range(10))
    assert first["seen"][:3] != first["seen"][3:]
    for key in ("weight", "loglik", "mse", "mean", "variance"):
        assert first[key] == second[key]


def test_a_network_on_all_rows(on_processes: dict[str, Any]) -> None:
    """The exact likelihood takes all rows on each process, and is that of one process."""
    (alone,) = on_processes["network exact alone"]
    for own in on_processes["network exact"]:
        for key in ("weight", "loglik", "mse", "mean", "variance"):
            np.testing.assert_allclose(own[key], alone[key], rtol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("a missing value", "Missing values in 'Reaction' (1 row)"),
        ("other types", "its column 'Reaction' is"),
        ("more processes than rows", "2 processes cannot share 1 row. Take at most 1."),
    ],
)
def test_mistakes_are_told_once_and_end_all(on_processes: dict[str, Any], mistake: str, said: str) -> None:
    first, second = on_processes[mistake]
    assert first["code"] == second["code"] == 1
    assert said in first["said"]
    assert len(first["said"].splitlines()) == 1
    assert second["said"] == ""
