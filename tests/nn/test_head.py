"""A head after training, and as a part of a network: predictions, states, devices, three lines in a module."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from openreml_nn.covariance import NeuralMatrix, ScalarMatrix
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead, in_chunks
from openreml_nn.testing.elsewhere import Elsewhere


def test_casting_a_model_leaves_the_head_in_float64(make):
    case = make("crossed")
    model = nn.ModuleDict({"network": nn.Linear(2, 1), "head": case.head()})
    model["head"].condition(case.f, case.y, case.groups)
    expected, variance = model["head"].predict(case.f, case.groups), model["head"].variance()
    model.to(torch.bfloat16)
    assert model["network"].weight.dtype == torch.bfloat16
    assert model["head"].variance() == variance
    for one, two in zip(model["head"].predict(case.f, case.groups), expected, strict=True):
        assert torch.equal(one, two)
    moved = copy.deepcopy(model["head"]).to("meta")
    assert all(p.dtype == torch.float64 and p.is_meta for p in moved.parameters())


def moved(given, device):
    if isinstance(given, torch.Tensor):
        return given.to(device)
    return (
        {k: moved(v, device) for k, v in given.items()}
        if isinstance(given, dict)
        else tuple(v.to(device) for v in given)
    )


@pytest.mark.parametrize("mode", ["batch", "exact", "features"])
def test_everything_happens_on_the_device_of_the_data(make, mode, another_device):
    for name in ("intercepts", "slopes, crossed, kernel"):
        case, head = make(name), make(name).head(mode=mode)
        case.y, output = 2.0 * case.y, torch.randn(len(case.y), 2 if mode == "features" else 1)
        expected = head(output, case.y, case.groups).item()
        with another_device() as device:
            head.to(device)
            data = [moved(part, device) for part in (output, case.y, case.groups)]
            data[0].requires_grad_()
            loss = head(*data)
            loss.backward()
            assert loss.item() == pytest.approx(expected, abs=1e-12)
            head.start(*data[1:])
            head.refit(*data, max_steps=0)
            mean, _ = head.predict(data[0], data[2])
            assert mean.device == device
            assert all(values.device == device for values in head.scored(*data).values())


@pytest.mark.skipif(not Elsewhere.works(), reason="this torch has no device to pretend")
@pytest.mark.parametrize("name", ["intercepts", "slopes without intercepts"])
def test_a_step_looks_at_the_range_of_the_codes_and_at_the_loss_alone(make, name):
    case = make(name)
    with Elsewhere() as device:
        head = case.head().to(device.name)
        f, y, groups = (moved(part, device.name) for part in (torch.randn(len(case.y)), case.y, case.groups))
        f.requires_grad_()
        for _ in range(2):  # the first ones look for what is worth a warning
            head(f, y, groups)
        device.forget()
        head(f, y, groups).backward()
        assert len(device.reads) == 2
        assert not device.checks + device.writes


def test_what_metrics_take(case):
    head = case.head()
    head.condition(case.f, case.y, case.groups)
    given = head.scored(case.f, case.y, case.groups)
    mean, variance = head.predict(case.f, case.groups)
    torch.testing.assert_close((given["preds"], given["variance"]), (mean, variance))
    assert torch.equal(given["target"], case.y)
    torch.testing.assert_close(given["fixed"], case.f.detach())
    V = head.covariance(case.groups)().detach()
    torch.testing.assert_close(given["random_variance"] + given["residual_variance"], V.diagonal())
    assert given["known"].all()
    new = {name: (-torch.ones_like(own[0]), own[1]) if isinstance(own, tuple) else -torch.ones_like(own)
           for name, own in case.groups.items()}  # fmt: skip
    given = head.scored(case.f, case.y, new)
    torch.testing.assert_close(given["random_variance"] + given["residual_variance"], given["variance"])
    assert not given["known"].any()


def test_what_metrics_take_of_features(make):
    case, phi = make("crossed"), torch.randn(48, 2, dtype=torch.float64)
    head = case.head(mode="features")
    with pytest.raises(ValueError, match="call `condition` or `refit` first"):
        head.scored(phi, case.y, case.groups)
    head.condition(phi, case.y, case.groups, variances=False)
    with pytest.raises(ValueError, match="conditioned without variances"):
        head.scored(phi, case.y, case.groups)
    result = head.refit(phi, case.y, case.groups)
    fixed = torch.cat([torch.ones(48, 1), phi], dim=1) @ result.beta
    torch.testing.assert_close(head.scored(phi, case.y, case.groups)["fixed"], fixed)


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_saved_head_predicts_without_the_data(case):
    head, other = case.head(), case.head(mode="exact")
    head.refit(case.f, case.y, case.groups, max_steps=0)
    expected = head.predict(case.f, case.groups)
    other.load_state_dict(saved(head))
    assert other.variance() == head.variance()
    for copied in (other, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        for one, two in zip(copied.predict(case.f, case.groups), expected, strict=True):
            assert torch.equal(one, two)


def test_states_come_and_go(make):
    case = make("intercepts")
    head, other = case.head(), case.head()
    plain = saved(head)
    head.condition(case.f, case.y, case.groups)
    nested, target = nn.ModuleList([head]), nn.ModuleList([other])
    target.load_state_dict(saved(nested))
    assert other.posterior is not None
    other.load_state_dict(plain)
    assert other.posterior is None
    nested.load_state_dict({}, strict=False)
    assert nested[0].posterior is not None
    third = MixedModelHead({"a": Effects(8)})
    with pytest.raises(ValueError, match="7 levels without labels, here are 8"):
        third.load_state_dict(saved(head))


def test_moved_thetas_are_noticed(make):
    case = make("intercepts")
    head = case.head()
    with pytest.raises(ValueError, match="call `condition` or `refit` first"):
        head.predict(case.f, case.groups)
    head.condition(case.f, case.y, case.groups)
    head.predict(case.f, case.groups)
    for change in (lambda: next(head.parameters()).data.add_(1e-9), lambda: head.offset.add_(1.0)):
        head.condition(case.f, case.y, case.groups)
        change()
        with pytest.raises(ValueError, match="moved since `condition`"):
            head.predict(case.f, case.groups)


def test_moved_weights_of_a_kernel_are_noticed():
    network = nn.Linear(2, 1)
    head = MixedModelHead({"a": Effects(3, covariance=NeuralMatrix(torch.randn(3, 2), network))})
    assert len(head.thetas) == len(list(head.parameters())) - 2 == 2
    codes, y = torch.arange(12) % 3, torch.randn(12)
    head.condition(torch.zeros(12), y, codes)
    head.predict(torch.zeros(3), torch.arange(3))
    nn.init.ones_(network.weight)
    with pytest.raises(ValueError, match="other parameters of the covariances"):
        head.predict(torch.zeros(3), torch.arange(3))


def test_fixed_and_tied_parameters(make):
    case = make("crossed")
    G = ScalarMatrix(7, start=2.0)
    head = MixedModelHead({"a": Effects(7, covariance=G), "b": Effects(7, covariance=G)})
    assert len(list(head.parameters())) == 2
    groups = {"a": case.groups["a"], "b": case.groups["a"].flip(0)}
    case.groups = groups
    assert head(case.f, case.y, groups).item() == pytest.approx(case.loss(head).item())
    G.set_no_grad([0])
    head(case.f, case.y, groups).backward()
    head.refit(case.f, case.y, groups)
    assert head.variance()["a/sigma^2"] == head.variance()["b/sigma^2"] == pytest.approx(2.0)
    head.predict(case.f, groups)


def test_names_that_modules_have_are_fine():
    head = MixedModelHead({"type": Effects(2), "a.b": Effects(2), "forward": Effects(2, covariance=ScalarMatrix(2))})
    assert list(head.effects) == ["type", "a.b", "forward"]
    codes = torch.tensor([0, 1, 0])
    head(torch.zeros(3), torch.ones(3), dict.fromkeys(head.effects, codes)).backward()
    assert list(head.variance()) == ["type/sigma^2", "a.b/sigma^2", "forward/sigma^2", "residual/sigma^2"]


class Patients(Dataset):
    """Rows as (x, y, code)."""

    def __init__(self, rows=120, patients=15):
        self.codes = torch.arange(rows) % patients
        self.x = torch.randn(rows, 3)
        self.y = self.x.sum(1) + 2.0 * torch.randn(patients)[self.codes] + 0.3 * torch.randn(rows)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i], self.codes[i]


class Module(L.LightningModule):
    """A user's own module; three lines of it are about the head."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1)
        self.head = MixedModelHead({"patient": Effects(15)})  # 1

    def training_step(self, batch, batch_idx):
        x, y, patient = batch
        return self.head(self.network(x), y, patient)  # 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*workers:UserWarning")
def test_three_lines_in_a_module(tmp_path):
    data, module = Patients(), Module()
    loader = DataLoader(data, batch_sampler=ClusterBatchSampler(data.codes, 40))  # 3
    trainer = L.Trainer(max_epochs=80, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, loader)
    assert module.head.variance()["residual/sigma^2"] == pytest.approx(0.09, abs=0.03)
    with torch.no_grad():
        output = in_chunks(module.network, data.x, 50)
    module.head.condition(output, data.y, data.codes)
    mean, _ = module.head.predict(output, data.codes)
    assert (mean - data.y).square().mean() < 0.12 < 2.0 < (output[:, 0] - data.y).square().mean()


def test_refused_batches():
    head = MixedModelHead({"a": Effects(2), "b": Effects(2)})
    y, codes = torch.ones(3), torch.tensor([0, 1, 0])
    whole = {"a": codes, "b": codes}
    for output, response, groups, message in (
        (torch.ones(3, 2), y, whole, r"output must be of shape \(m,\) or \(m, 1\), got \(3, 2\)"),
        (y, torch.ones(3, 2), whole, "y must be of shape"),
        (y, torch.ones(4), whole, "one output for each y, got 3 outputs and 4 y"),
        (y, y, {"a": codes}, r"levels of \['a', 'b'\], got those of \['a'\]"),
        (y, y, codes, r"needs a dictionary with the levels of \['a', 'b'\], got one tensor"),
        (y[:2], y, whole, "got 2 outputs and 3 y"),
        (y[:0], y[:0], {"a": codes[:0], "b": codes[:0]}, "a batch without rows"),
        (y, y, {"a": codes, "b": codes - 1}, "'b' has codes from 0 to 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            head(output, response, groups)
    few = MixedModelHead({"a": Effects(5)}, mode="features")
    with pytest.raises(ValueError, match="of 4 features and the intercept to each batch, which needs more than 5 rows"):
        few(torch.randn(5, 4), torch.randn(5), torch.arange(5))
    assert few(torch.randn(6, 4), torch.randn(6), torch.arange(6) % 5).isfinite()
    with pytest.raises(ValueError, match="features of shape"):
        MixedModelHead({"a": Effects(2)}, mode="features")(y, y, codes)
    for call in (head.condition, head.refit):
        with pytest.raises(ValueError, match="got 3 missing or infinite values in the output of the network"):
            call(y * torch.nan, y, whole)
        with pytest.raises(ValueError, match="got 1 missing or infinite values in y"):
            call(y, torch.tensor([1.0, 2.0, torch.inf]), whole)
    with pytest.raises(TypeError, match="y as a tensor, got ndarray"):
        head(y, y.numpy(), whole)
    head.condition(y, y - 1.5, whole)
    with pytest.raises(ValueError, match="'observation' or a 'mean'"):
        head.predict(y, whole, of="everything")


@pytest.mark.parametrize(("mode", "other"), [("batch", "features"), ("features", "exact")])
def test_state_of_a_head_of_another_mode(mode: str, other: str) -> None:
    """Features read as f, or f as a feature, would be predictions all the same."""
    g = torch.Generator().manual_seed(1)
    y, output = torch.randn(20, 2, generator=g, dtype=torch.float64).unbind(1)
    head = MixedModelHead({"z": Effects(4)}, mode=mode)
    head.condition(output[:, None], y, {"z": torch.arange(20) % 4})
    with pytest.raises(ValueError, match=f"in mode '{other}'.* Give it the mode of the training"):
        MixedModelHead({"z": Effects(4)}, mode=other).load_state_dict(head.state_dict())
