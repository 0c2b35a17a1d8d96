"""REMLModule: the same fit as `openreml_nn.fit`, with any optimizer, from any loader, from a checkpoint on."""

import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from openreml_nn import fit
from openreml_nn.covariance import ScalarMatrix
from openreml_nn.data import read_table
from openreml_nn.lightning import Batch, ConvergenceCallback, MixedModelDataModule, REMLModule
from openreml_nn.optim import Fisher, Halving
from openreml_nn.solvers import DenseSolver


@pytest.mark.parametrize("name", ["alpha", "boundary", "slopes", "serial"])
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_equals_fit(name, method, data, trainer):
    module = REMLModule(data(name).covariance, objective=method)
    trainer().fit(module, data(name))
    model = data(name).model
    expected = fit(model.V, model.y, model.X, x_names=model.x_names, method=method)
    result = module.result()
    assert result.loglik == expected.loglik
    assert torch.equal(result.theta, expected.theta)
    assert result.history == expected.history
    assert (result.converged, result.reason, result.held) == (expected.converged, expected.reason, expected.held)
    assert result.summary() == expected.summary()
    assert result.seconds > 0


def test_takes_objects(data, trainer):
    datamodule = data()
    module = REMLModule(datamodule.covariance, solver=DenseSolver(), direction=Fisher(), control=Halving())
    trainer().fit(module, datamodule)
    assert module.result().loglik == pytest.approx(-46.59691012098521, rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*workers:UserWarning", "ignore:.*val_dataloader:UserWarning")
def test_other_loaders(data, trainer):
    model = data().model
    reference = fit(data().model.V, model.y, model.X)
    for batches in ([(model.y, model.X)], [[model.y, model.X]], [Batch(model.y, model.X)]):
        module = REMLModule(data().covariance)
        trainer().fit(module, DataLoader(batches, batch_size=None))
        assert module.result().loglik == reference.loglik
    assert module.result().x_names == ["x0", "x1", "x2"]


@pytest.mark.filterwarnings("ignore:.*workers:UserWarning", "ignore:.*val_dataloader:UserWarning")
def test_rows_instead_of_a_data_set_are_refused(data, trainer):
    model = data().model
    two = DataLoader([(model.y, model.X), (model.y + 1.0, model.X)], batch_size=None)
    with pytest.raises(ValueError, match="second batch with other data"):
        trainer().fit(REMLModule(data().covariance), two)
    with pytest.raises(TypeError, match=r"needs a batch \(y, X\)"):
        trainer().fit(REMLModule(data().covariance), DataLoader([{"y": model.y}], batch_size=None))


def test_double_precision_plugin_changes_nothing(data, trainer):
    module, other = REMLModule(data().covariance), REMLModule(data().covariance)
    trainer().fit(module, data())
    trainer(precision="64-true").fit(other, data())
    assert module.result().loglik == other.result().loglik


def test_lbfgs(data, trainer):
    optimizer = functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=10)
    module = REMLModule(data().covariance, optimizer=optimizer)
    trainer().fit(module, data())
    result = module.result()
    assert result.converged
    assert result.n_iter < 20
    assert result.loglik == pytest.approx(-46.59691012098521, rel=1e-9)
    torch.testing.assert_close(
        torch.tensor(result.variance["estimate"].to_numpy()),
        torch.tensor([0.14290, 0.07022, 0.08162], dtype=torch.float64), atol=1e-5, rtol=0.0,
    )  # fmt: skip


def test_adam(data, trainer):
    module = REMLModule(data().covariance, optimizer=functools.partial(torch.optim.Adam, lr=0.1), tolerance=1e-10)
    trainer(max_epochs=500).fit(module, data())
    result = module.result()
    assert result.converged
    assert result.reason == "the score is zero"
    assert result.loglik == pytest.approx(-46.59691012098521, rel=1e-9)
    assert math.isnan(result.history[0].step_length)
    assert result.history[0].loglik < result.history[-1].loglik
    assert result.history[-1].loglik == result.loglik  # the last step is taken back, as the score was zero before it


def test_start_values(data, trainer):
    datamodule = data()
    module = REMLModule(datamodule.covariance, start=[-1.0, -1.3, -1.2])
    trainer(max_epochs=1, callbacks=[]).fit(module, datamodule)
    assert module.progress.loglik > -46.61
    datamodule.covariance.set_theta(torch.full((3,), 0.5, dtype=torch.float64))
    again = REMLModule(datamodule.covariance)
    trainer(max_epochs=1, callbacks=[]).fit(again, datamodule)
    model = data().model
    model.V.set_theta(torch.full((3,), 0.5, dtype=torch.float64))
    with pytest.warns(UserWarning, match="did not converge"):
        assert again.progress == fit(model.V, model.y, model.X, max_steps=1).history[0]


def test_second_fit_starts_at_the_estimates(data, trainer):
    module, datamodule = REMLModule(data().covariance), data()
    trainer().fit(module, datamodule)
    first = module.result()
    trainer().fit(module, datamodule)
    second = module.result()
    assert second.n_iter <= 1
    assert second.loglik == pytest.approx(first.loglik, rel=1e-14)


def test_all_parameters_fixed(data, trainer):
    module, datamodule = REMLModule(data().covariance), data()
    module.covariance.set_no_grad([0, 1, 2])
    trainer().fit(module, datamodule)
    result = module.result()
    assert result.converged
    assert result.reason == "all variance parameters are fixed"
    assert torch.equal(result.theta, torch.zeros(3, dtype=torch.float64))


def test_one_parameter_fixed(data, trainer):
    module, datamodule, model = REMLModule(data().covariance), data(), data().model
    for V in (module.covariance, model.V):
        V.set_no_grad(1)
    trainer().fit(module, datamodule)
    assert module.result().history == fit(model.V, model.y, model.X).history


def test_aliased_columns_are_dropped_with_a_warning(data, trainer):
    table = read_table("john_alpha").assign(twin=lambda frame: frame["rep"])
    datamodule = MixedModelDataModule(table, "`yield` ~ rep + twin", ["gen", "rep:block"])
    module = REMLModule(datamodule.covariance)
    with pytest.warns(UserWarning, match=r"dropped, from left to right: twin\[T.R2\], twin\[T.R3\]"):
        trainer().fit(module, datamodule)
    assert module.result().aliased == ["twin[T.R2]", "twin[T.R3]"]
    strict = REMLModule(datamodule.covariance, rank="error")
    with pytest.raises(ValueError, match="rank deficient"):
        trainer().fit(strict, datamodule)


def test_objective_in_small_letters(data):
    module = REMLModule(data().covariance, objective="ml")
    assert (module.objective.method, module.hparams["objective"]) == ("ML", "ML")


def test_bad_arguments(data):
    with pytest.raises(ValueError, match="`objective` must be"):
        REMLModule(ScalarMatrix(3), objective="MAP")
    with pytest.raises(ValueError, match="There is no solver"):
        REMLModule(ScalarMatrix(3), solver="magic")
    with pytest.raises(ValueError, match="needs data"):
        REMLModule(ScalarMatrix(3)).result()


def test_callbacks_can_monitor(data, trainer):
    module, datamodule = REMLModule(data().covariance), data()
    stop = EarlyStopping("loglik", mode="max", min_delta=1e-6, patience=1, check_on_train_epoch_end=True)
    run = trainer(callbacks=[stop])
    run.fit(module, datamodule)
    assert run.global_step < 6
    assert run.callback_metrics["loglik"].dtype == torch.float64
    assert float(run.callback_metrics["loglik"]) == module.progress.loglik


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
@pytest.mark.parametrize("name", ["alpha", "boundary", "slopes"])
@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}])
def test_resume_is_bit_identical(name, options, data, trainer, tmp_path):
    whole = REMLModule(data(name).covariance)
    uninterrupted = trainer()
    uninterrupted.fit(whole, data(name))

    def saving(folder, **more):
        keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, **options)
        return trainer(enable_checkpointing=True, callbacks=[keep, *more.pop("callbacks", [])], **more)

    saving(tmp_path, max_epochs=3).fit(REMLModule(data(name).covariance), data(name))
    rest = REMLModule(data(name).covariance)
    resumed = saving(tmp_path, callbacks=[ConvergenceCallback()])
    resumed.fit(rest, data(name), ckpt_path=tmp_path / "step=2.ckpt")

    a, b = whole.result(), rest.result()
    assert a.loglik == b.loglik
    assert torch.equal(a.theta, b.theta)
    assert a.history == b.history
    assert resumed.global_step == uninterrupted.global_step
    (mine,), (theirs,) = (run.optimizers[0].state.values() for run in (uninterrupted, resumed))
    assert mine["radius"] == theirs["radius"]
    assert mine["held"].tolist() == theirs["held"].tolist()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_resume_of_lbfgs_is_bit_identical(data, trainer, tmp_path):
    make = functools.partial(torch.optim.LBFGS, max_iter=3)
    whole, first, rest = (REMLModule(data().covariance, optimizer=make) for _ in range(3))
    trainer(max_epochs=8, callbacks=[]).fit(whole, data())
    keep = [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1) for _ in range(2)]
    trainer(max_epochs=4, enable_checkpointing=True, callbacks=keep[:1]).fit(first, data())
    again = trainer(max_epochs=8, enable_checkpointing=True, callbacks=keep[1:])
    again.fit(rest, data(), ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(whole.covariance.theta, rest.covariance.theta)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_by_another_optimizer_does_not_go_on(data, trainer, tmp_path):
    first = REMLModule(data().covariance, optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(first, data())
    for make, name in ((torch.optim.LBFGS, "LBFGS"), (None, "AverageInformation")):
        with pytest.raises(ValueError, match=f"The checkpoint is of a fit by Adam, this one is by {name}"):
            trainer().fit(REMLModule(data().covariance, optimizer=make), data(), ckpt_path=tmp_path / "last.ckpt")


def test_checkpoint_loads_without_pickled_objects(data, trainer, tmp_path):
    module = REMLModule(data().covariance, objective="ML", start="data")
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer(enable_checkpointing=True, callbacks=[keep, ConvergenceCallback()]).fit(module, data())
    plain = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert plain["hyper_parameters"] == {"objective": "ML", "solver": "auto", "start": "data", "rank": "drop"}
    back = REMLModule.load_from_checkpoint(tmp_path / "last.ckpt", covariance=data().covariance)
    assert torch.equal(back.covariance.theta, module.covariance.theta)
    assert back.history == module.history
    assert back.objective.method == "ML"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_checkpoint_of_something_else_is_refused(data, trainer, tmp_path):
    module = REMLModule(data().covariance)
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(module, data())
    with pytest.raises(ValueError, match="checkpoint is of another model"):
        trainer().fit(REMLModule(data("slopes").covariance), data("slopes"), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_checkpoint_of_other_data_is_refused(data, trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(REMLModule(data().covariance), data())
    table = read_table("john_alpha")
    changes = [
        (table.assign(**{"yield": table["yield"] + 1.0}), "the response differs"),
        (table.iloc[:-2], "it had 72 rows, this table has 70"),
        (table.assign(gen=table["gen"].to_numpy()[::-1]), "the term 'gen' differs"),
        (table.iloc[::-1], "the response and the fixed effects and the term 'gen' and the term 'rep:block' differ"),
    ]
    for changed, told in changes:
        other = MixedModelDataModule(changed, "yield ~ rep", ["gen", "rep:block"], predict_table=table.head(3))
        for command in ("fit", "validate", "predict"):
            run, module = trainer(), REMLModule(other.covariance)
            with pytest.raises(ValueError, match=f"fit to other data: {told}.*recomputed from it"):
                getattr(run, command)(module, other, ckpt_path=tmp_path / "last.ckpt")
    same = MixedModelDataModule(table.copy(), "yield ~ rep", ["gen", "rep:block"], predict_table=table.head(3))
    assert len(trainer().predict(REMLModule(same.covariance), same, ckpt_path=tmp_path / "last.ckpt")[0]) == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_checkpoint_at_the_last_epoch(data, trainer, tmp_path):
    for most, steps in ((2, 2), (4, 4), (1, 2)):
        keep = ModelCheckpoint(tmp_path / str(most), "last", enable_version_counter=False)
        first = REMLModule(data().covariance)
        trainer(max_epochs=steps, enable_checkpointing=True, callbacks=[keep]).fit(first, data())
        module = REMLModule(data().covariance)
        trainer(max_epochs=most, callbacks=[]).fit(module, data(), ckpt_path=tmp_path / str(most) / "last.ckpt")
        assert module.idle
        result = module.result()
        assert (result.n_iter, result.converged) == (steps, steps == 4)
        assert result.loglik == first.result().loglik
