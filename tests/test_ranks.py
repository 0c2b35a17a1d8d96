"""Fits on several processes: what a solver gives is what it gives on one, and all processes go the same way."""

import errno
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openreml_nn import fit
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.solvers import ALONE, SOLVERS, NotPositiveDefinite, ProcessGroup, Ranks, choose_solver, processes
from openreml_nn.solvers.ranks import Alone

EVALUATED = [
    "slopes blocks levels", "serial blocks levels", "slopes mixed_model_equations levels",
    "crossed mixed_model_equations levels", "crossed mixed_model_equations rows",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(on_processes: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of four processes found; the last one takes part in nothing."""
    return on_processes["solvers"]


def test_collectives(found: list[dict[str, Any]]) -> None:
    for place, own in enumerate(found[:3]):
        told = own["collectives"]
        assert told["sums"] == [[6.0, 12.0], [[6.0]]]
        assert told["largest"] == [3.0, 6.0]
        assert told["first"] == [1.0, 2.0]
        assert told["gather"] == [[], [2.0], [3.0, 6.0]]
        assert told["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert told["to_first"] == (["", "x", "xx"] if place == 0 else [])
        assert told["sent"] == 16
        assert told["same"]


def test_derivatives_of_a_sum_are_whole_on_each_process(found: list[dict[str, Any]]) -> None:
    theta = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (torch.tensor([6.0, 12.0], dtype=torch.float64) @ theta**3) ** 2

    for own in found[:3]:
        assert own["collectives"]["slope"] == torch.func.jacrev(loss)(theta).tolist()
        np.testing.assert_allclose(own["collectives"]["hessian"], torch.func.hessian(loss)(theta), rtol=1e-14)


def test_an_error_of_one_process_is_one_of_all(found: list[dict[str, Any]]) -> None:
    for own in found[:3]:
        assert own["collectives"]["error"] == (
            "ZeroDivisionError: integer division or modulo by zero (On process 2 of 3.)"
        )
        assert own["collectives"]["all"] == "ZeroDivisionError: integer division or modulo by zero"
        refused = own["refusals"]
        assert refused == found[0]["refusals"]
        assert (
            refused["nan"]
            == "ValueError: y holds 1 missing or infinite values. Drop or replace them. (On process 3 of 3.)"
        )
        assert "same columns on every process, got [7, 7, 3]" in refused["columns"]
        assert "Process 3 of 3 has no rows" in refused["empty"]
        assert refused["singular"].startswith("NotPositiveDefinite")
        assert "g 'a', rows 0, 1" in refused["singular"]  # of the second process
        assert "dense solver needs all rows on each process" in refused["dense"]
        assert "levels of their own on each process of one term" in refused["two terms"]
        assert refused["blocks for two terms"] == "blocks"


def test_fixed_effects(found: list[dict[str, Any]]) -> None:
    alone = found[0]["fixed alone"]
    for own in found[:3]:
        fixed = own["fixed"]
        assert fixed["kept"] == alone["kept"] == [0, 1, 2, 4, 5]
        assert fixed["n"] == 30
        assert fixed["refused"] == alone["refused"]
        assert fixed["orthonormal"] < 1e-14
        np.testing.assert_allclose(fixed["e"], alone["e"], atol=1e-14)
        np.testing.assert_allclose(fixed["beta"], alone["beta"], rtol=1e-15, atol=1e-8)
        for name in ("variance", "logdet", "f"):
            assert fixed[name] == pytest.approx(alone[name], rel=1e-13)
        for ours, theirs in zip(fixed["slopes"], alone["slopes"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13 * np.abs(theirs).max())


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluations(found: list[dict[str, Any]], name: str) -> None:
    alone = found[0][f"{name} alone"]
    for own in found[:3]:
        ours = own[name]
        assert ours.keys() == alone.keys()
        for quantity, theirs in alone.items():
            np.testing.assert_allclose(
                ours[quantity], theirs, rtol=0, atol=1e-11 * np.abs(theirs).max(), err_msg=quantity
            )
        assert ours["loglik"] == found[0][name]["loglik"]
        assert ours["score"] == found[0][name]["score"]


def test_fits(found: list[dict[str, Any]]) -> None:
    """Those of `scripts/check_ranks.py`: a boundary, aliased columns, crossed terms, traits, one row on a process."""
    lines = found[0]["fits"]
    assert len(lines) == 11
    assert not [line for line, short in lines if short]


def test_a_chain_has_one_layout_on_all_processes(found: list[dict[str, Any]]) -> None:
    alone = found[0]["chain alone"]
    assert alone["layout"][0] == "BandLayout"
    for own in found[:3]:
        assert own["chain"]["layout"] == alone["layout"]
        assert own["chain"]["steps"] == alone["steps"]
        assert own["chain"]["same"]
        assert own["chain"]["loglik"] == pytest.approx(alone["loglik"], rel=1e-13)
        np.testing.assert_allclose(own["chain"]["theta"], alone["theta"], atol=1e-11)


def test_messages_do_not_grow_with_the_rows(on_processes: dict[str, Any]) -> None:
    for few, many in on_processes["benchmark"]:
        assert (few["rows"], many["rows"]) == (1000, 10_000)
        assert few["sent"] == many["sent"] < 400


# ---- one process -----------------------------------------------------------------------------------------------------


def test_one_process_is_alone() -> None:
    assert processes() is ALONE
    assert ALONE.owning(["g"]) is ALONE
    x = torch.ones(2, requires_grad=True)
    assert ALONE.sums(x, x)[1] is x
    assert ALONE.shared(x) is x
    assert ALONE.count(3) == 3
    with pytest.raises(ZeroDivisionError, match="by zero"):
        ALONE.together(lambda: 1 // 0)
    assert isinstance(ALONE, Ranks)
    assert not isinstance(ALONE, ProcessGroup)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_which_solvers_share(solver: str) -> None:
    codes = torch.arange(12) // 3
    V = Sum(g=CovariancePropagation(DummyMatrix(codes), ScalarMatrix(4)), residual=ScalarMatrix(12))
    whole = SOLVERS[solver]().whole_terms(V)
    assert whole == (["g"] if solver in ("blocks", "mixed_model_equations") else None)
    assert choose_solver(V).solver.name == "spectral"
    assert choose_solver(V, share=True).solver.name == "mixed_model_equations"


class Second(Alone):
    """The first of two processes, where the second one has the error."""

    size = 2

    def objects(self, x: Any) -> list[Any]:
        return [None, pickle.loads(pickle.dumps(x))]


def agreed(error: Exception) -> Exception:
    with pytest.raises(Exception, match="On process 2 of 2") as raised:
        Second().agree(error)
    return raised.value


def test_an_error_of_another_process_is_the_same_kind_of_error() -> None:
    """Its class and what is known of a file; a class that is defined in a function cannot be sent."""
    denied = agreed(PermissionError(errno.EACCES, "Permission denied", Path("fits") / "a.csv"))
    assert isinstance(denied, PermissionError)
    assert (denied.errno, denied.filename) == (errno.EACCES, str(Path("fits") / "a.csv"))
    assert denied.strerror == "Permission denied (On process 2 of 2.)"
    assert str(agreed(OSError("No disk"))) == "No disk (On process 2 of 2.)"
    key = agreed(KeyError("There is no column 'a'."))
    assert (type(key), key.args) == (KeyError, ("There is no column 'a'. (On process 2 of 2.)",))
    assert type(agreed(NotPositiveDefinite("At zero."))) is NotPositiveDefinite
    assert type(agreed(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"))) is UnicodeError

    class Local(ValueError):
        pass

    class Strange(Exception):
        pass

    local, strange = agreed(Local("Not here.")), agreed(Strange("Not here."))
    assert (type(local), str(local)) == (ValueError, "Not here. (On process 2 of 2.)")
    assert (type(strange), str(strange)) == (RuntimeError, "Strange: Not here. (On process 2 of 2.)")


def test_a_fit_of_one_process_takes_ranks() -> None:
    codes = torch.arange(12) // 3
    y = torch.sin(torch.arange(12, dtype=torch.float64)) + codes
    V = Sum(g=CovariancePropagation(DummyMatrix(codes), ScalarMatrix(4)), residual=ScalarMatrix(12))
    assert fit(V, y, ranks=ALONE).sharing == ""
