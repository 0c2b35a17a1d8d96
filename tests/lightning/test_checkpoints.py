"""Checkpoints: whole or not there, without code, and with the random numbers."""

import errno
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from openreml_nn.lightning import ConvergenceCallback, RandomState, REMLModule, ResultFiles, SafeCheckpointIO
from openreml_nn.lightning.checkpoints import MIXED_MODEL, NETWORK, require_kind

PLAIN = {"a": torch.arange(3), "b": "text"}


@pytest.fixture
def io():
    return SafeCheckpointIO()


def test_round_trip(io, tmp_path):
    io.save_checkpoint(PLAIN, tmp_path / "new" / "a.ckpt")
    back = io.load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert back["b"] == "text"
    assert torch.equal(back["a"], PLAIN["a"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_was_there_is_kept_where_the_disk_is_full(io, tmp_path, monkeypatch, code):
    place = tmp_path / "a.ckpt"
    io.save_checkpoint(PLAIN, place)
    before = place.read_bytes()

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=os.strerror(code)):
        io.save_checkpoint({}, place)
    assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class Code:
    """An object that runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_with_code_is_refused(io, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, "bad.ckpt")
    with pytest.raises(ValueError, match=r"it holds an object of type \w+\.mkdir, and loading that could run any code"):
        io.load_checkpoint("bad.ckpt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="leave out `weights_only=False`"):
        io.load_checkpoint("bad.ckpt", weights_only=False)


def test_a_file_that_is_no_checkpoint_is_refused(io, tmp_path):
    io.save_checkpoint(PLAIN, tmp_path / "a.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:300])
    (tmp_path / "text.ckpt").write_text("no checkpoint\n")
    (tmp_path / "empty.ckpt").touch()
    for name in ("half", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}.ckpt (is no checkpoint|was not loaded)"):
            io.load_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(tmp_path / "nothing.ckpt")


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_random_numbers_go_on(data, trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        run = trainer(
            max_epochs=2, enable_checkpointing=True, plugins=[SafeCheckpointIO()], callbacks=[keep, RandomState()]
        )
        run.fit(REMLModule(data().covariance), data())
        expected = draws()
        assert draws() != expected
        trainer(max_epochs=2, callbacks=[RandomState()], plugins=[SafeCheckpointIO()]).fit(
            REMLModule(data().covariance), data(), ckpt_path=tmp_path / "last.ckpt"
        )
        assert draws() == expected
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_that_was_killed_after_its_last_step_makes_no_other(data, trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    whole, again = REMLModule(data().covariance), REMLModule(data().covariance)
    trainer(enable_checkpointing=True, callbacks=[keep, ConvergenceCallback()]).fit(whole, data())
    trainer().fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    assert again.history == whole.history
    assert torch.equal(again.covariance.theta, whole.covariance.theta)
    for ours, theirs in zip(again.natural_scale(), whole.natural_scale(), strict=True):  # as a monitor asks for it
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert again.result().n_iter == whole.result().n_iter


class Interrupt(Callback):
    """Ctrl-C in the middle of a step, after its trial point was set."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_interrupt_leaves_a_checkpoint_and_the_summary(data, trainer, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGINT)
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    run = trainer(enable_checkpointing=True, callbacks=[keep, Interrupt(), ResultFiles()], plugins=[SafeCheckpointIO()])
    module = REMLModule(data().covariance)
    try:
        with pytest.raises(SystemExit):
            run.fit(module, data())
    finally:
        signal.signal(signal.SIGINT, handler)
    shown = capsys.readouterr().out
    told = f"The fit was interrupted after 3 complete steps. It goes on from the checkpoint {tmp_path / 'last.ckpt'}"
    assert "NOT CONVERGED after 3 steps: interrupted after 3 complete steps." in shown
    assert told in shown
    record = json.loads((tmp_path / "fit.json").read_text())
    assert (record["converged"], record["iterations"]) == (False, 3)
    assert record["loglik"] == pytest.approx(module.history[-1].loglik, rel=1e-14)
    second = REMLModule(data().covariance)
    again = trainer(callbacks=[Interrupt(), ResultFiles(tmp_path / "again")])
    try:
        with pytest.raises(SystemExit):  # in the first step after the checkpoint
            again.fit(second, data(), ckpt_path=tmp_path / "last.ckpt")
    finally:
        signal.signal(signal.SIGINT, handler)
    twice = json.loads((tmp_path / "again" / "fit.json").read_text())
    assert (twice["iterations"], twice["loglik"]) == (3, pytest.approx(record["loglik"], rel=1e-14))
    rest, whole = REMLModule(data().covariance), REMLModule(data().covariance)
    trainer().fit(rest, data(), ckpt_path=tmp_path / "last.ckpt")
    trainer().fit(whole, data())
    assert torch.equal(rest.covariance.theta, whole.covariance.theta)
    assert rest.history == whole.history


def test_kinds_of_checkpoints():
    require_kind({"state_dict": {"objective.V.raw.sigma^2": 0}}, MIXED_MODEL, "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is of a network with random effects, which `openreml-nn network "):
        require_kind({"state_dict": {"network.weight": 0, "head.offset": 0}}, MIXED_MODEL, "last.ckpt")
    with pytest.raises(ValueError, match=r"is of something else. This is one of .*, for that of a network with random"):
        require_kind({"state_dict": {}}, NETWORK, "last.ckpt")
