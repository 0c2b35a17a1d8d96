"""The head as a part of a network: fits that must come out, types, states, refusals, three lines in a module."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from openreml_nn import fit
from openreml_nn.covariance import KnownMatrix, Matrix, NeuralMatrix, ScalarMatrix
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead, in_chunks
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.testing.elsewhere import Elsewhere


def minimise(loss, parameters, steps=60):
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
                                  tolerance_change=1e-16)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def design(case):
    return torch.stack([torch.ones(len(case.y)), torch.randn(len(case.y))], dim=1).double()


@pytest.mark.parametrize("name", ["intercepts", "slopes", "crossed", "kernel"])
def test_a_linear_network_gives_the_plain_fit_by_ml(make, name):
    case = make(name)
    case.y = case.y + 2.0 * torch.randn(7, dtype=torch.float64)[torch.as_tensor(
        case.groups["a"][0] if isinstance(case.groups["a"], tuple) else case.groups["a"])]  # fmt: skip
    X, head = design(case), case.head(mode="exact")
    network = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    rows = head.rows(case.groups)
    loss = minimise(lambda: head(network(X), case.y, rows), [*network.parameters(), *head.parameters()])
    result = fit(case.head().covariance(case.groups), case.y, X, method="ML")
    assert -len(case.y) * loss == pytest.approx(result.loglik, abs=1e-6)
    assert network.weight[0].tolist() == pytest.approx(result.beta.tolist(), abs=1e-5)
    assert list(head.variance().values()) == pytest.approx(result.variance["estimate"].tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["intercepts", "crossed"])
def test_features_give_the_plain_fit_by_reml(make, name):
    case = make(name)
    case.y = case.y + 2.0 * torch.randn(7, dtype=torch.float64)[case.groups["a"]]
    X, head = design(case), case.head(mode="features")
    loss = minimise(lambda: head(X[:, 1:], case.y, case.groups), list(head.parameters()))
    result = fit(case.head().covariance(case.groups), case.y, X)
    scale = 0.5 * torch.logdet(X.mT @ X).item()  # the likelihood of orthonormal contrasts does not depend on X's scale
    assert -len(case.y) * loss == pytest.approx(result.loglik + scale, abs=1e-6)
    assert list(head.variance().values()) == pytest.approx(result.variance["estimate"].tolist(), rel=1e-3, abs=1e-4)
    refitted = head.refit(X[:, 1:], case.y, case.groups)
    assert refitted.loglik == pytest.approx(result.loglik, abs=1e-8)
    assert list(head.variance()) == refitted.variance["name"].tolist()
    assert refitted.given == "the network, which gives the features"
    assert list(head.variance().values()) == pytest.approx(result.variance["estimate"].tolist(), rel=1e-5)


def test_the_scale_of_features_does_not_matter(make):
    case = make("slopes")
    head, phi = case.head(mode="features"), torch.randn(len(case.y), 2, dtype=torch.float64)
    mixed = phi @ torch.tensor([[3.0, 1.0], [0.0, 1e-3]], dtype=torch.float64)
    for groups in (case.groups, head.rows(case.groups)):
        one, two = head(phi, case.y, groups), head(mixed, case.y, groups)
        assert one.item() == pytest.approx(two.item(), abs=1e-10)


@pytest.mark.parametrize("mode", ["batch", "exact"])
@pytest.mark.parametrize("name", ["intercepts", "slopes", "crossed"])
def test_an_offset_is_a_part_of_f(make, name, mode):
    case, head, other = make(name), make(name).head(mode=mode), make(name).head(mode=mode)
    head.offset.fill_(1000.0)
    f = case.f.detach() - 1000.0
    assert head(f, case.y, case.groups).item() == pytest.approx(other(case.f, case.y, case.groups).item(), abs=1e-10)
    for own, output in ((head, f), (other, case.f)):
        own.refit(output, case.y, case.groups, max_steps=0)
    for one, two in zip(head.predict(f, case.groups), other.predict(case.f, case.groups), strict=True):
        torch.testing.assert_close(one, two)
    again = case.head(mode=mode)
    again.load_state_dict(saved(head))
    assert again.to(torch.bfloat16).offset.item() == 1000.0


def test_an_offset_is_set_to_a_number(make):
    head = make("intercepts").head()
    buffer = head.offset
    for value in (3, 3.0, torch.tensor([3.0])):
        head.offset = value
        assert head.offset is buffer
        assert (buffer.item(), buffer.dtype, buffer.shape) == (3.0, torch.float64, torch.Size([]))
        buffer.fill_(0.0)
    with pytest.raises(TypeError, match="`offset` must be one finite number"):
        head.offset = torch.ones(2)


@pytest.mark.parametrize("mode", ["batch", "exact"])
@pytest.mark.parametrize("name", ["intercepts", "crossed"])
def test_y_far_from_zero_is_said_once(make, name, mode):
    case, head, other = make(name), make(name).head(mode=mode), make(name).head(mode=mode)
    y = case.y + 40.0
    with torch.no_grad():
        head(case.f, y, case.groups)  # not in training
    groups = head.rows(case.groups) if mode == "exact" else case.groups
    with pytest.warns(UserWarning, match=r"y \+(39|4\d)\S* away from what the network gives.*head.offset = y.mean"):
        head(case.f, y, groups)
    head(case.f, y, groups)
    other.offset = y.mean()
    other(case.f, y, case.groups)
    make(name).head(mode="features")(torch.randn(len(y), 2), y, case.groups)


def test_the_mean_of_few_clusters_says_nothing(make):
    case = make("intercepts")
    case.head()(case.f, case.y + 40.0, {"a": case.groups["a"] % 4})


def test_start_shares_the_variance(make):
    case = make("crossed")
    y = 3.0 * case.y
    for groups in (case.groups, {name: (own, torch.ones(len(y), 1)) for name, own in case.groups.items()}):
        head = case.head()
        head.start(y, groups)
        assert list(head.variance().values()) == pytest.approx([y.var().item() / 3] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_networks(make, dtype):
    case = make("slopes")
    head = case.head()
    f = case.f.detach().to(dtype).requires_grad_()
    loss = head(f, case.y.float(), case.groups)
    assert loss.dtype == torch.float64
    (gradient,) = torch.autograd.grad(loss, f)
    assert gradient.dtype == dtype
    case.f = f.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(head(case.f, case.y.float(), case.groups), case.f)
    torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "exact", "features"])
def test_autocast_does_not_reach_the_likelihood(make, mode):
    case = make("slopes, crossed, kernel")
    head, network = case.head(mode=mode), nn.Linear(4, 2 if mode == "features" else 1)
    x = torch.randn(len(case.y), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(x)
        loss = head(output, case.y, case.groups)
    assert output.dtype == torch.bfloat16
    assert loss.item() == head(output.double(), case.y, case.groups).item()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


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
        output = torch.randn(len(case.y), 2 if mode == "features" else 1)
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


@pytest.mark.skipif(not Elsewhere.works(), reason="this torch has no device to pretend")
@pytest.mark.parametrize("name", ["intercepts", "slopes without intercepts"])
def test_a_step_looks_at_the_range_of_the_codes_and_at_the_loss_alone(make, name):
    case = make(name)
    with Elsewhere() as device:
        head = case.head().to(device.name)
        f, y, groups = (moved(part, device.name) for part in (torch.randn(len(case.y)), case.y, case.groups))
        f.requires_grad_()
        head(f, y, groups)  # the first one looks at the mean too
        device.forget()
        head(f, y, groups).backward()
        assert len(device.reads) == 2
        assert not device.checks + device.writes


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"effects": Effects(2)}, TypeError, r"by name, as \{'subject': Effects\(6\)\}, got Effects"),
     ({"effects": {}}, ValueError, "at least one factor"), ({"effects": {"a": 3}}, TypeError, "`Effects` for 'a'"),
     ({"effects": {"residual": Effects(2)}}, ValueError, "other than 'residual'"),
     ({"effects": {"a/b": Effects(2)}}, ValueError, "without '/'"),
     ({"effects": {"a": Effects(2)}, "mode": "whole"}, ValueError, "mode of 'batch', 'exact', 'features'"),
     ({"effects": {"a": Effects(2)}, "method": "MAP"}, ValueError, "method of 'REML' or 'ML'")],
)  # fmt: skip
def test_refused_heads(options, error, message):
    with pytest.raises(error, match=message):
        MixedModelHead(**options)


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


def test_a_covariance_that_fails_is_named():
    class Indefinite(ScalarMatrix):
        def build(self, params):
            return -super().build(params)

        submatrix = Matrix.submatrix
        common_block = level_blocks = lambda *_: None

    head = MixedModelHead({"a": Effects(2, covariance=Indefinite(2, start=9.0))})
    with pytest.raises(NotPositiveDefinite, match=r"V of these 3 rows.* at a/sigma\^2 = 9, residual/sigma\^2 = 1\."):
        head(torch.zeros(3), torch.ones(3), torch.tensor([0, 0, 1]))


def test_kernels_of_many_levels_use_those_of_the_batch():
    K = torch.eye(500, dtype=torch.float64) + 0.1
    head = MixedModelHead({"line": Effects(500, covariance=KnownMatrix(K))})
    codes = torch.tensor([3, 499, 3, 7])
    loss = head(torch.zeros(4), torch.ones(4), codes)
    V = head.covariance(codes)()
    expected = -torch.distributions.MultivariateNormal(torch.zeros(4).double(), V).log_prob(torch.ones(4)) / 4
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("mode", ["batch", "features", "exact"])
@pytest.mark.parametrize("name", ["intercepts", "slopes", "crossed", "kernel"])
def test_a_loss_that_is_not_finite_is_an_error(make, name, mode):
    case, features = make(name), mode == "features"
    output = torch.randn(len(case.y), 2) if features else torch.randn(len(case.y))
    for bad in (torch.nan, torch.inf):
        y, other = case.y.clone(), output.clone()
        y[1], other[3] = bad, bad
        with pytest.raises(ValueError, match=f"1 missing or infinite values in y, of {len(y)}. Leave such rows out"):
            case.head(mode=mode)(output, y, case.groups)
        with pytest.raises(ValueError, match=r"in the output of the network, .* its training has diverged"):
            case.head(mode=mode)(other, case.y, case.groups)
    for theta, said in ((-500.0, "0"), (torch.nan, "nan")):
        head = case.head(mode=mode)
        nn.init.constant_(head.residual.theta_parameters()[0], theta)
        with pytest.raises(ValueError, match=rf"residual/sigma\^2 = {said}\. A variance that goes to zero says"):
            head(output, case.y, case.groups)
