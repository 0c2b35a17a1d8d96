"""The divergence of a Gaussian posterior from N(0, G): against torch.distributions, its derivatives, its cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    NeuralMatrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.nn.prior import Prior
from openreml_nn.nn.variational import POSTERIORS, Block, Full, GaussianPosterior, MeanField
from openreml_nn.testing.kernels import random_kernel

Q = 4


# name: (effects of a level, G)
PRIORS: dict[str, tuple[int, Callable[[], Matrix]]] = {
    "one variance": (1, lambda: ScalarMatrix(Q)),
    "a variance for each level": (1, lambda: DiagonalMatrix(Q)),
    "kernel": (1, lambda: KnownMatrix(random_kernel(Q))),
    "AR(1) over levels": (1, lambda: AR1Matrix(Q)),
    "deep kernel": (1, lambda: NeuralMatrix(torch.randn(Q, 2).double(), torch.nn.Linear(2, 2).double(), "matern32")),
    "slopes": (2, lambda: KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(Q))),
    "slopes without covariance": (2, lambda: DiagonalMatrix(2 * Q)),
    "slopes by kernel": (2, lambda: KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(random_kernel(Q)))),
    "slopes by AR(1)": (2, lambda: KroneckerProduct(UnstructuredMatrix(2), AR1Matrix(Q))),
    "three factors": (
        2, lambda: KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(random_kernel(2)), IdentityMatrix(2))
    ),
    "unstructured": (2, lambda: UnstructuredMatrix(2 * Q)),
}  # fmt: skip


def made(prior: str, posterior: str) -> tuple[Matrix, GaussianPosterior, Prior]:
    """Everything at random values."""
    s, make = PRIORS[prior]
    torch.manual_seed(2)
    G = make()
    G.set_theta(0.5 * torch.randn(G.num_params))
    q = POSTERIORS[posterior](torch.ones(Q, s, dtype=torch.float64))
    for p in q.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return G, q, Prior(G, Q)


def dense_S(q: GaussianPosterior) -> Tensor:
    """S in the order of G: the level is the faster index."""
    every = torch.arange(Q)
    if isinstance(q, Full):
        root = q.roots(every).flatten(0, 1)
        S = root @ root.mT
    else:
        roots = q.roots(every) if isinstance(q, Block) else torch.diag_embed(q.log_scale.exp())
        S = torch.block_diag(*(root @ root.mT for root in roots))
    place = torch.arange(q.mean.numel()).reshape(Q, -1).mT.flatten()
    return S[place][:, place]


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("prior", PRIORS)
def test_against_torch(prior: str, posterior: str) -> None:
    G, q, given = made(prior, posterior)
    m, S = q.mean.mT.flatten(), dense_S(q)
    expected = kl_divergence(MultivariateNormal(m, S), MultivariateNormal(torch.zeros_like(m), G()))
    torch.testing.assert_close(q.kl(given.precision(G)), expected)
    torch.testing.assert_close(q.deviations().mT.flatten(), S.diagonal().sqrt())


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("prior", ["a variance for each level", "slopes", "slopes by kernel", "slopes by AR(1)"])
def test_derivatives(prior: str, posterior: str) -> None:
    G, q, given = made(prior, posterior)
    both = torch.nn.ModuleList([G, q])
    names = [name for name, _ in both.named_parameters()]

    class Divergence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self) -> Tensor:
            return q.kl(given.precision(G))

    def divergence(*values: Tensor) -> Tensor:
        state = {f"both.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Divergence(), state, ())

    assert torch.autograd.gradcheck(divergence, [p.detach().clone().requires_grad_() for p in both.parameters()])


def test_it_reaches_the_weights_of_a_deep_kernel() -> None:
    G, q, given = made("deep kernel", "mean_field")
    q.kl(given.precision(G)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in G.network.parameters() if p.ndim == 2)  # type: ignore


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_zero_at_the_prior(posterior: str) -> None:
    G = KroneckerProduct(ScalarMatrix(2, start=4.0), IdentityMatrix(Q))
    q = POSTERIORS[posterior](torch.full((Q, 2), 2.0, dtype=torch.float64))
    assert q.kl(Prior(G, Q).precision(G)).item() == pytest.approx(0.0, abs=1e-12)


def test_the_best_covariance_is_that_of_the_posterior() -> None:
    """The M step of variational EM: Σ = (1/q) Σ_l (S_l + m_l m_l')."""
    G, q, given = made("slopes", "block")
    assert isinstance(q, Block)
    roots, m = q.roots(torch.arange(Q)), q.mean[:, :, None]
    expected = (roots @ roots.mT + m @ m.mT).mean(0).detach()
    optimizer = torch.optim.LBFGS(G.theta_parameters(), max_iter=100, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = q.kl(given.precision(G))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(G().reshape(2, Q, 2, Q)[:, 0, :, 0].detach(), expected, rtol=1e-6, atol=1e-7)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_independent_levels_have_no_matrix_over_levels() -> None:
    levels = 200_000  # of which a matrix would be 300 GiB
    G, q = KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(levels)), Block(torch.ones(levels, 2))
    q.kl(Prior(G, levels).precision(G)).backward()
    assert q.mean.grad is not None


def test_a_full_posterior_that_does_not_fit() -> None:
    with pytest.raises(MemoryError, match=r"full posterior of 1000000 effects .* Take posterior='block'"):
        Full(torch.ones(1_000_000, 1))


def test_mean_field_has_two_numbers_for_each_effect() -> None:
    assert sum(p.numel() for p in MeanField(torch.ones(5, 3)).parameters()) == 30
    assert sum(p.numel() for p in Block(torch.ones(5, 3)).parameters()) == 5 * 3 * 6 // 2
    assert sum(p.numel() for p in Full(torch.ones(5, 3)).parameters()) == 15 + 15 * 16 // 2
