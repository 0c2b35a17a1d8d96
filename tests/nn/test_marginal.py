"""The loss of a head: fits that must come out, offsets, types, refusals."""

import pytest
import torch
from torch import nn

from openreml_nn import fit
from openreml_nn.covariance import KnownMatrix, Matrix, ScalarMatrix
from openreml_nn.nn import Effects, MixedModelHead
from openreml_nn.solvers import NotPositiveDefinite


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
    again.load_state_dict(head.state_dict())
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
    with pytest.warns(UserWarning, match=r"y \+(39|4\d)\S* away from what the network gives.*head.start\(y, groups\)"):
        head(case.f, y, groups)
    head(case.f, y, groups)
    other.offset = y.mean()
    other(case.f, y, case.groups)
    make(name).head(mode="features")(torch.randn(len(y), 2), y, case.groups)


def test_the_mean_of_few_clusters_says_less(make):
    case = make("intercepts")
    groups, y = {"a": case.groups["a"] % 4}, case.y / case.y.std()
    case.head()(case.f, y + 12.0, groups)
    with pytest.warns(UserWarning, match="away from what the network gives"):
        case.head()(case.f, y + 20.0, groups)


def test_start_shares_the_variance(make):
    case = make("crossed")
    y = 3.0 * case.y
    for groups in (case.groups, {name: (own, torch.ones(len(y), 1)) for name, own in case.groups.items()}):
        head = case.head()
        head.start(y, groups)
        assert list(head.variance().values()) == pytest.approx([y.var().item() / 3] * 3)


@pytest.mark.parametrize("mode", ["batch", "exact", "features"])
def test_start_sets_the_offset_unless_there_is_one(make, mode):
    case = make("crossed")
    head, y = case.head(mode=mode), case.y.float()[:, None] + 40.0
    groups = head.rows(case.groups) if mode == "exact" else case.groups
    head.start(y, groups)
    assert head.offset.item() == (0.0 if mode == "features" else pytest.approx(y.double().mean().item(), rel=1e-12))
    assert list(head.variance().values()) == pytest.approx([y.double().var().item() / 3] * 3)
    head.offset = -1.0
    head.start(2.0 * y, groups)
    assert head.offset.item() == -1.0
    with pytest.raises(ValueError, match="missing or infinite"):
        head.start(y * torch.nan, groups)
    with pytest.raises(TypeError, match="needs y as a tensor"):
        head.start(y.numpy(), groups)


@pytest.mark.parametrize("mode", ["batch", "exact", "features"])
@pytest.mark.parametrize("name", ["intercepts", "slopes", "crossed", "kernel"])
def test_variances_far_from_those_of_y_are_said_once(make, name, mode):
    case = make(name)
    output = torch.randn(len(case.y), 2) if mode == "features" else torch.zeros(len(case.y))
    for scale in (20.0, 0.02):
        head, y = case.head(mode=mode), scale * case.y
        with torch.no_grad():
            head(output, y, case.groups)  # not in training
        with pytest.warns(UserWarning, match=r"random effects and residual have one of .*`head.start\(y, groups\)`"):
            head(output, y, case.groups)
        head(output, y, case.groups)
        head = case.head(mode=mode)
        head.requires_grad_(False)
        head(output.clone().requires_grad_(), y, case.groups)  # these variances are known
        head.requires_grad_(True)
        head.start(y, case.groups)
        head(output, y, case.groups)


def test_the_variance_that_is_compared_is_that_of_a_row(make):
    """In the mean of the rows, by each way that a batch can take."""
    seen = []
    for name in ("slopes", "kernel", "slopes, crossed, kernel"):
        case = make(name)
        for mode in ("batch", "exact"):
            head = case.head(mode=mode)
            head._first.look = lambda r, y, terms, variance: seen.append(variance)
            head(case.f, case.y, case.groups)
            head(case.f, case.y, head.rows(case.groups))
        expected = head.covariance(case.groups)().diagonal().mean().item()
        assert seen[-4:] == pytest.approx([expected] * 4, rel=1e-12)


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


def test_start_needs_a_response_for_each_row() -> None:
    head = MixedModelHead({"z": Effects(4)})
    with pytest.raises(ValueError, match="y and groups of equal length, got 9 and 10"):
        head.start(torch.randn(9), {"z": torch.arange(10) % 4})
