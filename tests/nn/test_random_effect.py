"""Random effects as a layer: exact where the model is Gaussian, close to the likelihood where it is not."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, poisson_nll_loss

from openreml_nn import ML
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood import blup, full_loglik, prediction_error_variance
from openreml_nn.nn.effects import Effects
from openreml_nn.nn.random_effect import RandomEffect
from openreml_nn.nn.variational import POSTERIORS
from openreml_nn.solvers import NotPositiveDefinite, random_terms
from openreml_nn.testing.elsewhere import Elsewhere
from openreml_nn.testing.kernels import random_kernel

Q, SIGMA2 = 6, 0.5
SLOPES = ["intercept", "x"]


def minimise(loss: Callable[[], Tensor], parameters: Any, steps: int = 500) -> float:
    """The smallest value of a loss without noise."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return loss().item()


# ---- a Gaussian response: the posterior is known ---------------------------------------------------------------------

GAUSSIAN: dict[str, Callable[[], Effects]] = {
    "intercepts": lambda: Effects(Q, covariance=ScalarMatrix(Q, start=2.0)),
    "variances": lambda: Effects(Q, covariance=DiagonalMatrix(Q, start=[0.5, 1.0, 2.0, 1.0, 0.3, 4.0])),
    "slopes": lambda: Effects(Q, SLOPES, UnstructuredMatrix(2, start=[[2.0, 0.6], [0.6, 0.8]])),
    "kernel": lambda: Effects(Q, covariance=KnownMatrix(random_kernel(Q), start=1.5)),
    "AR(1)": lambda: Effects(Q, covariance=AR1Matrix(Q, start=[1.5, 0.7])),
    "slopes by kernel": lambda: Effects(
        Q,
        SLOPES,
        KroneckerProduct(UnstructuredMatrix(2, start=[[2.0, 0.6], [0.6, 0.8]]), KnownMatrix(random_kernel(Q))),
    ),
}


def gaussian(name: str) -> tuple[Effects, Tensor, Tensor | None, Tensor]:
    """Effects with known thetas, codes, design and response of unbalanced data; the last level has no record."""
    effects = GAUSSIAN[name]()
    effects.requires_grad_(False)
    codes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4, 4])
    torch.manual_seed(5)
    x = torch.randn(len(codes), 2, dtype=torch.float64)
    x[:, 0] = 1.0
    return effects, codes, x if effects.num_effects == 2 else None, 2.0 * torch.randn(len(codes), dtype=torch.float64)


def negative_elbo(layer: RandomEffect, codes: Tensor, design: Tensor | None, y: Tensor) -> Tensor:
    """E_q log N(y | z'b, σ²) in closed form."""
    mean, variance = layer.moments(codes, design)
    squares = ((y - mean).square() + variance).sum() / SIGMA2
    return 0.5 * (squares + len(y) * math.log(2.0 * math.pi * SIGMA2)) + layer.kl()


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_response(name: str, posterior: str) -> None:
    """The mean is the BLUP; a full posterior has its prediction error covariance and the bound is the likelihood."""
    effects, codes, design, y = gaussian(name)
    layer = RandomEffect(effects, posterior).double()
    elbo = -minimise(lambda: negative_elbo(layer, codes, design, y), layer.posterior.parameters())

    term = CovariancePropagation(effects.incidence(codes, design), effects.G)
    V = Sum(b=term, residual=ScalarMatrix(len(y), start=SIGMA2))
    objective = ML(V, "dense")
    evaluation = objective.prepare(y, torch.zeros(len(y), 0, dtype=torch.float64)).evaluate()
    (b,) = random_terms(V, V.theta.detach())
    expected = blup(evaluation, b)
    got = layer.posterior.mean.detach().mT.flatten()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    loglik = full_loglik(evaluation).item()
    assert elbo <= loglik + 1e-8
    if posterior == "full" or name in ("intercepts", "variances") or (name, posterior) == ("slopes", "block"):
        assert elbo == pytest.approx(loglik, abs=1e-7)
        pev = prediction_error_variance(evaluation, b)
        torch.testing.assert_close(layer.posterior.deviations().square().detach().mT.flatten(), pev, rtol=1e-4, atol=0)
        if posterior == "full":
            G, Z = effects.G(), term.Z()
            PEV = G - G @ Z.mT @ torch.linalg.solve(V(), Z @ G)
            order = torch.arange(len(G)).reshape(-1, Q).mT.flatten()
            root = layer.posterior.roots(torch.arange(Q)).flatten(0, 1)  # type: ignore[operator]
            torch.testing.assert_close((root @ root.mT).detach(), PEV[order][:, order], rtol=1e-3, atol=1e-5)


def test_variance_parameters_by_the_bound_are_those_of_maximum_likelihood() -> None:
    effects, codes, design, y = gaussian("intercepts")
    effects.requires_grad_(True)
    layer = RandomEffect(effects, "full").double()
    elbo = -minimise(lambda: negative_elbo(layer, codes, design, y), layer.parameters())
    V = Sum(b=CovariancePropagation(effects.incidence(codes, design), ScalarMatrix(Q)),
            residual=ScalarMatrix(len(y), start=SIGMA2))  # fmt: skip
    objective = ML(V, "dense")
    problem = objective.prepare(y, torch.zeros(len(y), 0, dtype=torch.float64))
    loglik = -minimise(lambda: -full_loglik(problem.evaluate()), V.operand("b").parameters())
    assert elbo == pytest.approx(loglik, abs=1e-7)
    assert effects.G.natural(effects.G.theta).item() == pytest.approx(V.natural(V.theta)[0].item(), rel=1e-4)


def test_draws_lead_to_the_blup_too() -> None:
    """Adam on draws, half of the rows at a time."""
    effects, codes, design, y = gaussian("slopes")
    layer = RandomEffect(effects, "block").double()
    optimizer = torch.optim.Adam(layer.posterior.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=800)
    for _ in range(800):
        rows = torch.randperm(len(y))[: len(y) // 2]
        optimizer.zero_grad()
        fitted = layer(codes[rows], None if design is None else design[rows])
        (0.5 * (y[rows] - fitted).square().mean() / SIGMA2 + layer.kl() / len(y)).backward()
        optimizer.step()
        schedule.step()
    V = effects.incidence(codes, design).sandwich(torch.zeros(0), effects.G, effects.G.theta)
    V = V + SIGMA2 * torch.eye(len(y))
    mean = V @ torch.linalg.solve(V, y) - SIGMA2 * torch.linalg.solve(V, y)
    torch.testing.assert_close(layer(codes, design, sample=False).detach(), mean, rtol=0.0, atol=0.15)


# ---- draws -----------------------------------------------------------------------------------------------------------


def random_layer(posterior: str, name: str = "slopes") -> RandomEffect:
    torch.manual_seed(4)
    layer = RandomEffect(GAUSSIAN[name](), posterior).double()
    for p in layer.posterior.parameters():
        nn.init.normal_(p, std=0.4)
    return layer


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_draws_have_the_moments(posterior: str, shared: bool) -> None:
    layer, count = random_layer(posterior), 20_000
    codes, z = torch.tensor([1, 3, -1, 3]), torch.tensor([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0], [0.0, 1.0]])
    mean, variance = layer.moments(codes, z)
    torch.testing.assert_close(layer(codes, z, sample=False), mean)
    with torch.no_grad():
        if shared:
            draws = torch.stack([layer(codes, z, sample=True, shared=True) for _ in range(count // 20)])
            of = torch.stack([layer.effects_of(codes, sample=True, shared=True) for _ in range(count // 20)])
        else:
            draws = layer(codes.repeat(count), z.repeat(count, 1), sample=True).reshape(count, 4)
            of = layer.effects_of(codes.repeat(count), sample=True).reshape(count, 4, 2)
    by_effects = (of * z).sum(2)
    for got in (draws, by_effects):
        assert torch.allclose(got.mean(0), mean, atol=4.0 * (variance.max() / len(got)).sqrt().item())
        torch.testing.assert_close(got.var(0), variance, rtol=0.2 if shared else 0.05, atol=0.0)
    same = of[:, 1] == of[:, 3]
    assert bool(same.all()) if shared else not bool(same.any())
    assert bool((draws[:, 2] != 0).all())


def test_draws_for_each_row_have_gradients_of_the_same_mean_and_less_variance() -> None:
    layer = random_layer("mean_field", "intercepts")
    codes, y = torch.zeros(50, dtype=torch.int64), torch.randn(50, dtype=torch.float64)

    def gradients(shared: bool) -> Tensor:
        found = []
        for _ in range(1000):
            loss = (y - layer(codes, sample=True, shared=shared)).square().mean()
            found.append(torch.autograd.grad(loss, layer.posterior.log_scale)[0][0, 0])
        return torch.stack(found)

    own, joint = gradients(False), gradients(True)
    exact = 2.0 * layer.posterior.log_scale[0, 0].exp().square()  # of E(y − b)² by the logarithm of its scale
    assert own.mean().item() == pytest.approx(exact.item(), rel=0.05)
    assert joint.mean().item() == pytest.approx(exact.item(), rel=0.2)
    assert own.var() < 0.1 * joint.var()


def test_in_training_there_are_draws_and_else_the_mean() -> None:
    layer, codes = random_layer("mean_field", "intercepts"), torch.tensor([0, 1, -1])
    mean = layer.posterior.mean[:2, 0]
    assert not torch.equal(layer(codes), layer(codes))
    assert torch.equal(layer(codes, sample=False), torch.cat([mean, mean.new_zeros(1)]))
    layer.eval()
    assert torch.equal(layer(codes)[:2], mean)
    assert torch.equal(layer.effects_of(codes)[:2, 0], mean)
    assert not torch.equal(layer(codes, sample=True), layer(codes))


def test_an_unknown_level_has_the_prior_of_an_average_one() -> None:
    layer = random_layer("block", "slopes by kernel")
    z = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    mean, variance = layer.moments(torch.tensor([-1, -1]), z)
    G = layer.effects.G().reshape(2, Q, 2, Q)
    average = torch.stack([G[:, level, :, level] for level in range(Q)]).mean(0)
    assert not bool(mean.any())
    torch.testing.assert_close(variance, ((z @ average) * z).sum(1))
    assert not bool(layer.effects_of(torch.tensor([-1]), sample=False).any())


# ---- in networks -----------------------------------------------------------------------------------------------------


def test_gradients_flow_through_the_design() -> None:
    layer = random_layer("block")
    network, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    layer(torch.tensor([0, 1, 2, -1]), network(x), sample=False).sum().backward()
    assert network.weight.grad is not None
    assert bool(network.weight.grad.any())


def test_codes_and_design_as_a_pair() -> None:
    layer, codes = random_layer("block"), torch.tensor([0, 1, 2, -1])
    design = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer((codes, design), sample=False), layer(codes, design, sample=False))
    torch.testing.assert_close(layer.moments((codes, design)), layer.moments(codes, design))
    layer((codes, design), sample=False).sum().backward()
    assert bool(design.grad[:3].any())  # type: ignore[index]
    for bad in ((codes, design, design), [0, 1]):
        with pytest.raises(TypeError, match=r"or \(codes, design\), got"):
            layer(bad)
    with pytest.raises(TypeError, match=r"or \(codes, design\), got \(tuple, Tensor\)"):
        layer((codes, design), design)


def test_variance_parameters_by_name() -> None:
    layer = RandomEffect(Effects(3, SLOPES, DiagonalMatrix(2, start=[4.0, 9.0])))
    assert layer.variance() == pytest.approx({"sigma^2_0": 4.0, "sigma^2_1": 9.0})


def test_effects_of_channels() -> None:
    """A CNN in single precision whose feature map is shifted by effects of the scanner."""
    channels = [f"channel {i}" for i in range(4)]
    scanner = RandomEffect(Effects(["a", "b", "c"], channels, ScalarMatrix(12)))
    first, last = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
    images, codes = torch.randn(5, 1, 8, 8), scanner.effects.encode(list("abcab"))
    shift = scanner.effects_of(codes)
    assert shift.dtype == torch.float32
    features = (first(images) + shift[:, :, None, None]).relu().mean((2, 3))
    loss = cross_entropy(last(features), torch.tensor([0, 1, 0, 1, 0])) + scanner.kl() / 5
    loss.backward()
    assert all(p.grad is not None for p in scanner.parameters())
    assert scanner.effects.G.theta.dtype == torch.float64


# ---- counts: against lme4 and the marginal likelihood ----------------------------------------------------------------

COUNTS = [  # 12 levels, x = −1, −½, 0, ½, 1
    [0, 2, 4, 2, 0], [3, 2, 0, 2, 1], [1, 0, 4, 0, 4], [0, 0, 0, 0, 3], [1, 1, 1, 1, 3], [2, 3, 0, 0, 2],
    [3, 1, 0, 4, 0], [1, 6, 8, 5, 11], [0, 3, 3, 2, 1], [0, 2, 3, 2, 1], [2, 1, 5, 3, 8], [1, 0, 0, 2, 3],
]  # fmt: skip
# R 4.2, lme4 1.1-31: glmer(y ~ x + (1 | g), family = poisson), Laplace (nAGQ = 1), optimizer "bobyqa"
LAPLACE = {"loglik": -112.033035597, "beta": [0.54335, 0.39686], "sigma^2": 0.244049}
CONDITIONAL_MODES = [-0.0747988, -0.0747988, 0.0037017, -0.5404164, -0.1576542, -0.1576542,
                     -0.0747988, 1.0870365, 0.0037017, -0.0747988, 0.6112454, -0.2452330]  # fmt: skip
AGQ = {"beta": [0.542755, 0.396850], "sigma^2": 0.246350}  # nAGQ = 25


def marginal_loglik(y: Tensor, fixed: Tensor, sigma: float) -> float:
    """Σ_l log ∫ Π Poisson(y | exp(fixed + b)) dN(b | 0, σ²), by 60 Gauss-Hermite points; shapes (levels, rows)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    eta = fixed[:, :, None] + sigma * torch.from_numpy(nodes)
    logs = (y[:, :, None] * eta - eta.exp() - torch.lgamma(y + 1.0)[:, :, None]).sum(1)
    return (logs + torch.from_numpy(np.log(weights / np.sqrt(2.0 * np.pi)))).logsumexp(1).sum().item()


def test_counts() -> None:
    y = torch.tensor(COUNTS, dtype=torch.float64)
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).repeat(12)
    codes = torch.arange(12).repeat_interleave(5)
    layer = RandomEffect(Effects(12)).double()
    beta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def loss() -> Tensor:
        mean, variance = layer.moments(codes)
        eta = beta[0] + beta[1] * x + mean
        rate = (eta + 0.5 * variance).exp()  # E exp(η + b)
        return (rate - y.flatten() * eta + torch.lgamma(y.flatten() + 1.0)).sum() + layer.kl()

    elbo = -minimise(loss, [beta, *layer.parameters()])
    sigma2 = layer.effects.G.natural(layer.effects.G.theta).item()
    exact = marginal_loglik(y, (beta[0] + beta[1] * x).detach().reshape(12, 5), sigma2**0.5)
    assert exact - 0.1 < elbo < exact
    assert elbo == pytest.approx(LAPLACE["loglik"], abs=0.1)
    assert beta.tolist() == pytest.approx(AGQ["beta"], abs=0.01)
    assert sigma2 == pytest.approx(AGQ["sigma^2"], rel=0.05)
    assert np.allclose(layer.posterior.mean[:, 0].tolist(), CONDITIONAL_MODES, atol=0.06)
    assert beta.tolist() == pytest.approx(LAPLACE["beta"], abs=0.01)


# ---- batches, draws, a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "loss_of", "sigma"),
    [
        (lambda eta: torch.bernoulli(eta.sigmoid()), binary_cross_entropy_with_logits, 1.5),
        (lambda eta: torch.poisson(eta.exp()), poisson_nll_loss, 0.7),
    ],
    ids=["Bernoulli", "Poisson"],
)
def test_clusters_in_batches(draw: Callable[[Tensor], Tensor], loss_of: Callable[..., Tensor], sigma: float) -> None:
    """30 clusters of 30: Adam on network, posterior and variance finds what a network alone cannot see."""
    torch.manual_seed(1)
    q, n = 30, 900
    truth, codes, x = sigma * torch.randn(q), torch.arange(n) % q, torch.randn(n, 2)
    eta = (x[:, 0] * x[:, 1]).clamp(-2.0, 2.0) + truth[codes]
    y, rows, test = draw(eta), torch.arange(600), torch.arange(600, n)

    def error(layer: RandomEffect | None) -> float:
        """Loss of new rows of the same clusters."""
        torch.manual_seed(2)
        network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        modules = nn.ModuleList([network] if layer is None else [network, layer])
        optimizer = torch.optim.Adam(modules.parameters(), lr=0.03)

        def loss(batch: Tensor) -> Tensor:
            fitted = network(x[batch])[:, 0]
            return loss_of(fitted if layer is None else fitted + layer(codes[batch]), y[batch])

        for _ in range(40):
            for batch in rows[torch.randperm(len(rows))].split(60):
                optimizer.zero_grad()
                (loss(batch) + (0.0 if layer is None else layer.kl() / len(rows))).backward()
                optimizer.step()
        modules.eval()
        with torch.no_grad():
            return loss(test).item()

    layer, least = RandomEffect(Effects(q)), loss_of(eta[test], y[test]).item()
    assert error(layer) - least < 0.5 * (error(None) - least)
    assert np.corrcoef(layer.posterior.mean[:, 0].tolist(), truth.tolist())[0, 1] > 0.85
    assert 0.5 * sigma**2 < layer.effects.G.natural(layer.effects.G.theta).item() < 2.0 * sigma**2


@pytest.mark.parametrize("name", GAUSSIAN)
def test_centring_gives_the_bias_what_lowers_the_divergence_most(name: str) -> None:
    layer = random_layer("block", name)
    codes, s = torch.arange(Q), layer.effects.num_effects
    for effect in layer.effects.effects:
        z = torch.zeros(Q, s, dtype=torch.float64)
        z[:, layer.effects.effects.index(effect)] = 1.0
        fitted, kl = layer(codes, z, sample=False), layer.kl()
        c = layer.centre(effect)
        torch.testing.assert_close(layer(codes, z, sample=False) + c, fitted)
        assert layer.kl() < kl
        (slope,) = torch.autograd.grad(layer.kl(), layer.posterior.mean)
        assert slope[:, layer.effects.effects.index(effect)].sum().item() == pytest.approx(0.0, abs=1e-10)
        assert layer.centre(effect).item() == pytest.approx(0.0, abs=1e-12)


def test_large_counts_and_the_bias() -> None:
    """Without centring the means keep what the bias did not find, and the variance grows by its square."""
    torch.manual_seed(1)
    q, n = 40, 1200
    truth, codes = 0.5 * torch.randn(q), torch.arange(n) % q
    y = torch.poisson((6.0 + truth[codes]).exp())
    found = {}
    for centred in (False, True):
        layer, bias = RandomEffect(Effects(q), scale=0.1), nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([bias, *layer.parameters()], lr=0.05)
        for _ in range(25):
            for rows in torch.randperm(n).split(100):
                optimizer.zero_grad()
                (poisson_nll_loss(bias + layer(codes[rows]), y[rows]) + layer.kl() / n).backward()
                optimizer.step()
            if centred:
                with torch.no_grad():
                    bias += layer.centre()
        found[centred] = (bias.item() - truth.mean().item(), layer.effects.G.natural(layer.effects.G.theta).item())
    assert found[False][0] < 5.7
    assert found[True][0] == pytest.approx(6.0, abs=0.03)
    assert found[True][1] == pytest.approx(truth.var().item(), rel=0.1)
    assert found[False][1] > 1.5 * found[True][1]


# ---- saving, labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_state(posterior: str) -> None:
    def make(labels: str) -> RandomEffect:
        G = KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(random_kernel(Q)))
        return RandomEffect(Effects(list(labels), SLOPES, G), posterior)

    layer, other = make("abcdef"), make("abcdef")
    layer.effects.G.set_theta(torch.tensor([0.3, 0.2, -0.5, 0.1]))
    for p in layer.posterior.parameters():
        nn.init.normal_(p)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not any("inverse" in key for key in state)  # the kernel is data
    other.load_state_dict(state)
    codes, z = torch.tensor([0, 5, -1]), torch.randn(3, 2)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(codes, z, sample=False), layer(codes, z, sample=False))
        assert torch.equal(twin.moments(codes, z)[1], layer.moments(codes, z)[1])
        assert torch.equal(twin.kl(), layer.kl())
    with pytest.raises(ValueError, match="other levels"):
        make("abcdeg").load_state_dict(state)


def test_table() -> None:
    layer = RandomEffect(Effects(["u", "v"], SLOPES, ScalarMatrix(4, start=9.0)), "block")
    with torch.no_grad():
        layer.posterior.mean.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    expected = pd.DataFrame(
        {
            "effect": ["intercept", "intercept", "x", "x"],
            "level": ["u", "v", "u", "v"],
            "mean": [1.0, 3.0, 2.0, 4.0],
            "sd": 3.0,
        }
    )
    pd.testing.assert_frame_equal(layer.table(), expected, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = RandomEffect(GAUSSIAN["slopes by kernel"](), "block").to(dtype)
    codes, z = torch.tensor([0, -1]), torch.ones(2, 2)
    assert layer(codes, z).dtype == layer.effects_of(codes).dtype == layer.moments(codes, z)[1].dtype == dtype
    assert layer.kl().dtype == torch.float64


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_on_another_device(posterior: str, another_device: Callable[[], AbstractContextManager[torch.device]]) -> None:
    layer = random_layer(posterior, "slopes by kernel")
    codes, z = torch.tensor([0, 5, -1]), torch.randn(3, 2, dtype=torch.float64)
    moments, kl = layer.moments(codes, z), layer.kl()
    with another_device() as device:
        layer.to(device)
        there = layer.moments(codes.to(device), z.to(device))
        torch.testing.assert_close([x.cpu() for x in there], list(moments))
        torch.testing.assert_close(layer.kl().cpu(), kl)
        for shared in (False, True):
            layer(codes.to(device), z.to(device), shared=shared).sum().backward()
        assert {p.grad.device for p in layer.parameters() if p.grad is not None} == {device}


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(TypeError, match="needs `Effects`, got int"):
        RandomEffect(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean_field', 'block', 'full', got 'diagonal'"):
        RandomEffect(Effects(3), "diagonal")
    with pytest.raises(ValueError, match="`scale` greater than 0, got 0"):
        RandomEffect(Effects(3), scale=0.0)
    with pytest.raises(ValueError, match=r"one of the effects \['intercept'\], got 'x'"):
        RandomEffect(Effects(3)).centre("x")
    layer = RandomEffect(Effects(3))
    nn.init.constant_(layer.effects.G.theta_parameters()[0], -math.inf)
    with pytest.raises(ValueError, match="a variance of G is zero"):
        RandomEffect(layer.effects)
    with pytest.raises(NotPositiveDefinite, match="Is a variance zero"):
        layer(torch.tensor([-1]))
    layer = RandomEffect(Effects(3, SLOPES, KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(3))))
    with pytest.raises(ValueError, match="codes from 0 to 2, got 3"):
        layer.effects_of(torch.tensor([3]))
    with pytest.raises(ValueError, match=r"needs \(codes, design\)"):
        layer(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"design of shape \(1, 2\)"):
        layer(torch.tensor([0]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="integer codes"):
        layer(torch.tensor([0.0]), torch.ones(1, 2))


def test_a_matrix_is_shared_by_layers() -> None:
    """Two layers with one G have one set of thetas, and both divergences reach it."""
    G: Matrix = ScalarMatrix(3)
    first, second = RandomEffect(Effects(3, covariance=G)), RandomEffect(Effects(3, covariance=G))
    nn.init.ones_(second.posterior.mean)
    (first.kl() + second.kl()).backward()
    assert G.theta_parameters()[0].grad.item() == pytest.approx(-3.0)  # type: ignore[union-attr]


@pytest.mark.skipif(not Elsewhere.works(), reason="this torch has no device to pretend")
def test_a_step_looks_at_the_range_of_the_codes_alone() -> None:
    with Elsewhere() as device:
        layer = RandomEffect(Effects(4)).to(device.name)
        codes = (torch.arange(8) % 4).to(device.name)
        device.forget()
        layer(codes).sum().backward()
        assert len(device.reads) == 1
