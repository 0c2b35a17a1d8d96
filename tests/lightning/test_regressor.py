"""MixedModelRegressor: a network and a head in a Trainer, its checkpoints, its logs, its predictions."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from openreml_nn import MixedModelRegressor, fit
from openreml_nn.covariance import NeuralMatrix
from openreml_nn.lightning.network_batches import joined
from openreml_nn.metrics import functional
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*workers:UserWarning", "ignore:.*val_dataloader:UserWarning", "ignore:Checkpoint directory:UserWarning"
)
SUBJECTS = 12


class Visits(Dataset):
    """Rows (x, y, {"subject": (code, (1, t)), "site": code})."""

    def __init__(self, rows=150, seed=0):
        g = torch.Generator().manual_seed(seed)
        truth = torch.Generator().manual_seed(99)
        b, a = torch.randn(SUBJECTS, 2, generator=truth), torch.randn(4, generator=truth)
        self.x = torch.randn(rows, 3, generator=g)
        self.subject, self.site = torch.arange(rows) % SUBJECTS, torch.randint(0, 4, (rows,), generator=g)
        self.design = torch.stack([torch.ones(rows), torch.rand(rows, generator=g)], dim=1)
        self.y = self.x.sum(1) + (b[self.subject] * self.design).sum(1) + a[self.site]
        self.y += 0.3 * torch.randn(rows, generator=g)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i], self.groups(i)

    def groups(self, i=slice(None)):
        return {"subject": (self.subject[i], self.design[i]), "site": self.site[i]}


def head(**options):
    return MixedModelHead({"subject": Effects(SUBJECTS, ["intercept", "t"]), "site": Effects(4)}, **options)


def regressor(network=None, mode="batch", **options):
    options = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "rows": 64} | options
    return MixedModelRegressor(network or nn.Linear(3, 1), head(mode=mode), **options)


def loader(data, size=50):
    return DataLoader(data, batch_sampler=ClusterBatchSampler(data.subject, size))


def test_trains_validates_predicts(trainer):
    data, new, module = Visits(), Visits(60, seed=1), regressor()
    run = trainer(max_epochs=40, callbacks=[])
    run.fit(module, loader(data), DataLoader(new, batch_size=20))
    logged = dict(run.callback_metrics)
    assert logged["val/mse"] < 0.3
    assert set(logged) == {"train/loss", "val/mse", *(f"variance/{name}" for name in module.head.variance())}
    assert logged["variance/residual/sigma^2"].item() == pytest.approx(0.09, abs=0.05)
    mean, variance = joined(run.predict(module, DataLoader(new, batch_size=20)))
    assert (mean - new.y).square().mean() == pytest.approx(logged["val/mse"].item(), rel=1e-5)
    error = (mean - new.y) / variance.sqrt()
    assert 0.6 < error.square().mean() < 1.6
    with torch.no_grad():
        expected = module.head.predict(module(new.x), new.groups())
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(variance, expected[1])


def test_random_effects_come_from_all_rows_of_the_data_set(trainer):
    data, module = Visits(), regressor()
    run = trainer(max_epochs=1, callbacks=[])
    with pytest.warns(UserWarning, match="different rows of the same levels of 'subject', 'site'"):
        run.fit(module, DataLoader(data, batch_size=40, shuffle=True, drop_last=True))
    other = head()
    other.load_state_dict({k: v for k, v in module.head.state_dict().items() if "posterior" not in k})
    with torch.no_grad():
        other.condition(module(data.x), data.y, data.groups())
        for one, two in zip(other.predict(module(data.x), data.groups()),
                            module.head.predict(module(data.x), data.groups()), strict=True):  # fmt: skip
            torch.testing.assert_close(one, two)


@pytest.mark.filterwarnings("ignore:.*different rows of the same levels:UserWarning")
def test_rows_that_are_held_out_by_a_sampler_stay_out(trainer):
    data, module = Visits(), regressor()
    chosen = torch.arange(0, 150, 2)
    data.y[1::2] += 1e6
    trainer(max_epochs=1, callbacks=[]).fit(module, DataLoader(data, 25, sampler=SubsetRandomSampler(chosen)))
    assert module.head.offset.item() == pytest.approx(data.y[chosen].double().mean().item())
    assert module.head.predict(module(data.x), data.groups())[0].abs().max() < 20.0


def test_refit_is_the_fit_of_what_the_network_leaves(trainer):
    data, module = Visits(), regressor(refit=True)
    trainer(max_epochs=3, callbacks=[]).fit(module, loader(data))
    with torch.no_grad():
        left = data.y.double() - module(data.x)[:, 0].double() - module.head.offset
    expected = fit(head().covariance(data.groups()), left, left[:, None][:, :0])
    assert module.result.loglik == pytest.approx(expected.loglik, abs=1e-8)
    module.head.predict(module(data.x), data.groups())


def test_exact_likelihood_by_lbfgs(trainer):
    data = Visits()
    network = nn.Linear(3, 1).double()
    module = regressor(network, "exact", optimizer=lambda p: torch.optim.LBFGS(
        p, max_iter=80, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-15))  # fmt: skip
    batch = (data.x.double(), data.y.double(), data.groups())
    trainer(max_epochs=2, callbacks=[]).fit(module, DataLoader([batch], batch_size=None))
    X = torch.cat([data.x.double(), torch.ones(len(data), 1)], dim=1)
    expected = fit(head().covariance(data.groups()), data.y.double(), X, method="ML")
    with torch.no_grad():
        loss = module.head(module(batch[0]), batch[1], batch[2])
    assert -len(data) * loss.item() == pytest.approx(expected.loglik, abs=1e-6)


def test_the_exact_batch_is_moved_once(trainer):
    data, moves = Visits(), []

    class Watched(MixedModelRegressor):
        def training_step(self, batch, batch_idx):
            moves.append(batch)
            return super().training_step(batch, batch_idx)

    module = Watched(nn.Linear(3, 1), head(mode="exact"))
    batch = (data.x, data.y, data.groups())
    trainer(max_epochs=3, callbacks=[]).fit(module, DataLoader([batch], batch_size=None))
    assert len(moves) == 3
    assert all(moved is moves[0] for moved in moves)
    assert module._moved is None  # nothing is held after the fit
    module.train()
    first = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert module.transfer_batch_to_device(list(batch), torch.device("cpu"), 0) is first
    other = module.transfer_batch_to_device((data.x, data.y + 1.0, data.groups()), torch.device("cpu"), 0)
    assert torch.equal(other[1], data.y + 1.0)
    assert module.transfer_batch_to_device(batch, torch.device("meta"), 0)[0].is_meta


def test_checkpoints_predict_by_themselves(trainer, tmp_path):
    data, new, module = Visits(), Visits(60, seed=1), regressor()
    best = ModelCheckpoint(tmp_path, monitor="val/mse")
    run = trainer(max_epochs=3, callbacks=[best], enable_checkpointing=True)
    run.fit(module, loader(data), DataLoader(new, batch_size=20))
    run.save_checkpoint(tmp_path / "last.ckpt")
    score = best.best_model_score.item()
    expected = joined(run.predict(module, DataLoader(new, batch_size=20)))
    got = {}
    for path in (tmp_path / "last.ckpt", best.best_model_path):
        again = MixedModelRegressor.load_from_checkpoint(path, network=nn.Linear(3, 1), head=head())
        assert (again.rows, again.refit, again.start) == (64, False, "auto")
        got[str(path)] = joined(trainer(callbacks=[]).predict(again, DataLoader(new, batch_size=20)))
    torch.testing.assert_close(got[str(tmp_path / "last.ckpt")], expected)
    assert (got[best.best_model_path][0] - new.y).square().mean().item() == pytest.approx(score, rel=1e-5)
    other = MixedModelHead({"subject": Effects(SUBJECTS + 1, ["intercept", "t"]), "site": Effects(4)})
    with pytest.raises(ValueError, match="12 levels without labels, here are 13"):
        MixedModelRegressor.load_from_checkpoint(tmp_path / "last.ckpt", network=nn.Linear(3, 1), head=other)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(trainer, precision):
    data, module = Visits(), regressor()
    run = trainer(max_epochs=2, callbacks=[], precision=precision)
    told = pytest.warns(UserWarning, match="rounds y and designs to half precision.* Take '16-mixed' or 'bf16-mixed'")
    with told if precision == "bf16-true" else nullcontext():
        run.fit(module, loader(data), DataLoader(data, batch_size=50))
    assert torch.isfinite(run.callback_metrics["val/mse"])
    assert all(p.dtype == torch.float64 for p in module.head.parameters())
    mean, variance = run.predict(module, DataLoader(data, batch_size=50))[0]
    assert mean.dtype == variance.dtype == torch.float64


def kernel_head():
    """Sites by a kernel whose features a network makes: its weights are no thetas."""
    G = NeuralMatrix(torch.randn(4, 2), nn.Linear(2, 2), "matern32")
    return MixedModelHead({"subject": Effects(SUBJECTS, ["intercept", "t"]), "site": Effects(4, covariance=G)})


@pytest.mark.parametrize("make", [head, kernel_head])
def test_own_learning_rate_of_the_thetas(make):
    module = MixedModelRegressor(nn.Linear(3, 1), make(), optimizer=torch.optim.AdamW, head_lr=0.1)
    network, own = module.configure_optimizers().param_groups
    assert (network["lr"], network["weight_decay"]) == (1e-3, 1e-2)
    assert (own["lr"], own["weight_decay"]) == (0.1, 0.0)
    assert len(own["params"]) == sum("raw" in name for name, _ in module.head.named_parameters())


@pytest.mark.parametrize("make", [head, kernel_head])
def test_thetas_have_no_weight_decay(make):
    module = MixedModelRegressor(nn.Linear(3, 1), make(), optimizer=torch.optim.AdamW)
    module.more = nn.Linear(1, 1)  # as of a user's subclass
    others, own = module.configure_optimizers().param_groups
    assert (others["weight_decay"], own["weight_decay"], own["lr"]) == (1e-2, 0.0, 1e-3)
    thetas = {id(p) for name, p in module.head.named_parameters() if "raw" in name}
    assert {id(p) for p in own["params"]} == thetas
    assert len(others["params"]) == len(list(module.parameters())) - len(thetas)
    (both,) = regressor(optimizer=torch.optim.Adam).configure_optimizers().param_groups
    assert both["weight_decay"] == 0


@pytest.mark.parametrize("plateau", [False, True])
def test_schedules_of_the_learning_rate(trainer, plateau):
    def schedule(optimizer):
        kind = torch.optim.lr_scheduler.ReduceLROnPlateau if plateau else torch.optim.lr_scheduler.StepLR
        return kind(optimizer, **({"patience": 0, "threshold": 1e9} if plateau else {"step_size": 1}))

    module, data = regressor(scheduler=schedule, head_lr=0.2), Visits()
    run = trainer(max_epochs=3, callbacks=[])
    run.fit(module, loader(data), DataLoader(data, batch_size=50))
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates == pytest.approx([5e-5, 2e-4])
    if plateau:
        run = trainer(max_epochs=4, callbacks=[], check_val_every_n_epoch=2)
        run.fit(module, loader(data), DataLoader(data, batch_size=50))
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-4)  # two validations
    with pytest.raises(ValueError, match="watches `val/mse`, and this fit has no val") if plateau else nullcontext():
        trainer(max_epochs=1, callbacks=[]).fit(module, loader(data))


def test_scores_of_test_rows(trainer):
    data, new, module = Visits(), Visits(60, seed=1), regressor()
    run = trainer(max_epochs=2, callbacks=[])
    with pytest.raises(ValueError, match="no random effects to predict with"):
        run.test(module, DataLoader(new, batch_size=20), verbose=False)
    module.train()
    run.fit(module, loader(data))
    (logged,) = run.test(module, DataLoader(new, batch_size=20), verbose=False)
    with torch.no_grad():
        mean, _ = module.head.predict(module(new.x), new.groups())
    assert logged["test/mse"] == pytest.approx((mean - new.y).square().mean().item(), rel=1e-5)


def test_more_scores_by_one_option(trainer):
    data, new, module = Visits(), Visits(60, seed=1), regressor(metrics=True)
    new.subject[:5] = -1
    run = trainer(max_epochs=2, callbacks=[])
    run.fit(module, loader(data), DataLoader(new, batch_size=25))
    logged = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    with torch.no_grad():
        given = module.head.scored(module(new.x), new.y, new.groups())
    mean, y, variance = given["preds"], given["target"], given["variance"]
    shares = [given[name] for name in ("fixed", "random_variance", "residual_variance")]
    expected = {
        "mse": (mean - y).square().mean(),
        "nlpd": functional.negative_log_predictive_density(mean, y, variance),
        "coverage": functional.interval_coverage(mean, y, variance),
        "r2_marginal": functional.marginal_r2(*shares),
        "r2_conditional": functional.conditional_r2(*shares),
        "icc": functional.intraclass_correlation(*shares[1:]),
    }
    assert logged == pytest.approx({f"val/{name}": value.item() for name, value in expected.items()})
    (tested,) = run.test(module, DataLoader(new, batch_size=25), verbose=False)
    assert tested == pytest.approx({f"test/{name}": value.item() for name, value in expected.items()})
    with pytest.raises(ValueError, match="got metrics=True and variances=False"):
        regressor(metrics=True, variances=False)


def test_thetas_start_from_the_data(trainer):
    data = Visits()
    for start, moves in (("auto", True), ("data", True), ("current", False)):
        module = regressor(start=start, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        trainer(max_epochs=1, callbacks=[]).fit(module, loader(data))
        variance = module.head.variance()["residual/sigma^2"]
        assert variance == pytest.approx(data.y.var().item() / 3 if moves else 1.0)
    module = regressor(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    module.head.residual.set_theta(torch.ones(1))
    trainer(max_epochs=1, callbacks=[]).fit(module, loader(data))
    assert module.head.residual.theta.item() == 1.0
    with pytest.raises(ValueError, match="`start` must be"):
        regressor(start="zero")


def test_weights_of_a_kernel_are_no_start_and_an_offset_needs_none(trainer):
    data, still = Visits(), lambda p: torch.optim.SGD(p, lr=0.0)
    data.y += 100.0
    module = MixedModelRegressor(nn.Linear(3, 1), kernel_head(), still, rows=64)
    trainer(max_epochs=1, callbacks=[]).fit(module, loader(data))
    assert module.head.variance()["residual/sigma^2"] == pytest.approx(data.y.var().item() / 3)
    assert module.head.offset.item() == pytest.approx(data.y.mean().item())
    for start, moves in (("auto", True), ("current", False)):
        module = MixedModelRegressor(nn.Linear(3, 1), head(residual=0.5), still, start, rows=64)
        said = nullcontext() if moves else pytest.warns(UserWarning, match="away from what the network gives")
        with said:
            trainer(max_epochs=1, callbacks=[]).fit(module, loader(data))
        assert module.head.variance()["residual/sigma^2"] == pytest.approx(0.5)
        assert module.head.offset.item() == pytest.approx(data.y.mean().item() if moves else 0.0)


def test_training_has_no_random_effects_among_the_buffers(trainer):
    """DDP sends all buffers before each step."""
    seen = []

    class Watched(MixedModelRegressor):
        def training_step(self, batch, batch_idx):
            seen.append(any("posterior" in name for name, _ in self.named_buffers()))
            return super().training_step(batch, batch_idx)

    data, module = Visits(), Watched(nn.Linear(3, 1), head(), rows=64)
    run = trainer(max_epochs=2, callbacks=[], val_check_interval=2)
    run.fit(module, loader(data), DataLoader(data, batch_size=50))
    assert seen == [False] * 6
    assert any("posterior" in name for name, _ in module.named_buffers())


def test_the_mean_of_y_does_not_matter(trainer):
    logged = []
    for mean in (0.0, 1000.0):
        torch.manual_seed(0)
        data, module = Visits(), regressor()
        data.y = data.y.double() + mean
        run = trainer(max_epochs=3, callbacks=[])
        run.fit(module, loader(data), DataLoader(data, batch_size=50))
        logged.append([run.callback_metrics["val/mse"].item(), *module.head.variance().values()])
        assert module.head.offset.item() == pytest.approx(data.y.mean().item())
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    features = MixedModelRegressor(nn.Linear(3, 2), head(mode="features"), rows=64)
    trainer(max_epochs=1, callbacks=[]).fit(features, loader(data))
    assert features.head.offset.item() == 0.0


def test_without_validation_and_without_a_trainer():
    data, module = Visits(), regressor(variances=False)
    module.condition(loader(data))
    mean, variance = module.predict_step((data.x, data.groups()), 0)
    assert variance is None
    assert len(mean) == len(data)
    with pytest.raises(ValueError, match="there are none"):
        module.condition([])


@pytest.mark.parametrize("options", [{}, {"save_last": True, "filename": "best"}, {"save_weights_only": True}])
def test_default_checkpoints_predict_after_the_fit(trainer, tmp_path, options):
    data, module, saved = Visits(), regressor(refit=True), ModelCheckpoint(tmp_path, **options)
    run = trainer(max_epochs=2, callbacks=[saved], enable_checkpointing=True)
    run.fit(module, loader(data))
    rows = DataLoader(data, batch_size=50)
    expected = joined(run.predict(module, rows))
    torch.testing.assert_close(joined(run.predict(module, rows, ckpt_path="best")), expected)
    for path in {saved.best_model_path, saved.last_model_path} - {""}:
        again = MixedModelRegressor.load_from_checkpoint(path, network=nn.Linear(3, 1), head=head())
        torch.testing.assert_close(joined(trainer(callbacks=[]).predict(again, rows)), expected)
    if not saved.save_weights_only:
        more = trainer(max_epochs=3, callbacks=[ModelCheckpoint(tmp_path, **options)], enable_checkpointing=True)
        more.fit(module, loader(data), ckpt_path=saved.best_model_path)
        assert (more.current_epoch, more.global_step) == (3, run.global_step // 2 * 3)


class Scored(MixedModelRegressor):
    """Says that the first epoch was the best."""

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("score", float(self.current_epoch))


def test_best_checkpoint_of_an_earlier_epoch_stays(trainer, tmp_path):
    data, best = Visits(), ModelCheckpoint(tmp_path, monitor="score")
    module = Scored(nn.Linear(3, 1), head(), refit=True, rows=64)
    run = trainer(max_epochs=2, callbacks=[best], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="is of an earlier step and predicts with the variance parameters before"):
        run.fit(module, loader(data))
    rows = DataLoader(data, batch_size=50)
    with pytest.raises(ValueError, match=r"call `model.condition\(train_loader\)`, and predict without `ckpt_path`"):
        run.predict(module, rows, ckpt_path="best")
    again = MixedModelRegressor.load_from_checkpoint(best.best_model_path, network=nn.Linear(3, 1), head=head())
    again.condition(loader(data))
    assert len(joined(trainer(callbacks=[]).predict(again, rows))[0]) == len(data)


def test_exact_likelihood_of_minibatches_is_said(trainer):
    with pytest.warns(UserWarning, match="wants all rows as one batch, and the loader gives 3 batches"):
        trainer(max_epochs=1, callbacks=[]).fit(regressor(mode="exact"), loader(Visits()))


def test_batches_of_another_form():
    data, module = Visits(20), regressor()
    with pytest.raises(ValueError, match=r"Batches are \(x, y, groups\), got 2 parts"):
        module.training_step((data.x, data.y), 0)
    with pytest.raises(ValueError, match=r"Batches are \(x, y, groups\), got 4 parts"):
        module.condition([(data.x, data.y, data.subject, data.site)])
    with pytest.raises(TypeError, match=r"got str. Of labels make codes by `Effects.encode`"):
        module.condition([(data.x, data.y, ["a"] * 20)])
    with pytest.raises(TypeError, match="got a finished one, Adam"):
        regressor(optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
