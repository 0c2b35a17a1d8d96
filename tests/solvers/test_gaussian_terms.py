"""The three numbers of a Gaussian likelihood and their derivatives, against plain formulas and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn.solvers.gaussian_terms import GaussianTerms

N = 7
root = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
V = root @ root.mT + torch.eye(N, dtype=torch.float64)
E = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def basis(p: int) -> Tensor:
    return torch.randn(N, p, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def terms(V: Tensor, U: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The differentiable outputs; V is made symmetric, because one triangle is read."""
    return GaussianTerms.apply(0.5 * (V + V.mT), U, e)[:3]


def plain(V: Tensor, U: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Vi = torch.linalg.inv(0.5 * (V + V.mT))
    M = U.mT @ Vi @ U
    P = Vi - Vi @ U @ torch.linalg.inv(M) @ U.mT @ Vi
    return torch.logdet(0.5 * (V + V.mT)), torch.logdet(M), e @ P @ e


@pytest.mark.parametrize("p", [0, 1, 3])
def test_values(p: int) -> None:
    U = basis(p)
    for got, expected in zip(terms(V, U, E), plain(V, U, E), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("p", [0, 1, 3])
def test_what_is_not_differentiable(p: int) -> None:
    U = basis(p)
    *_, L, Q, Pe, gamma, M_inverse = GaussianTerms.apply(V, U, E)
    Vi = torch.linalg.inv(V)
    M = U.mT @ Vi @ U
    torch.testing.assert_close(L @ L.mT, V)
    torch.testing.assert_close(Q @ Q.mT, Vi @ U @ torch.linalg.inv(M) @ U.mT @ Vi)
    torch.testing.assert_close(M_inverse, torch.linalg.inv(M))
    torch.testing.assert_close(gamma, torch.linalg.inv(M) @ U.mT @ Vi @ E)
    torch.testing.assert_close(Pe, Vi @ (E - U @ gamma))
    assert not any(x.requires_grad for x in (L, Q, Pe, gamma, M_inverse))


@pytest.mark.parametrize("p", [1, 3])
def test_derivatives(p: int) -> None:
    inputs = tuple(x.clone().requires_grad_() for x in (V, basis(p), E))
    assert gradcheck(terms, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(terms, inputs, check_fwd_over_rev=True)


def test_derivatives_without_fixed_effects() -> None:
    inputs = tuple(x.clone().requires_grad_() for x in (V, E))
    assert gradcheck(lambda V, e: terms(V, basis(0), e), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda V, e: terms(V, basis(0), e), inputs)


@pytest.mark.parametrize("keep", [True, False])
def test_gradient_in_place_and_recorded_agree(keep: bool) -> None:
    """The first-order gradient is added up in place where nothing watches, and by plain formulas otherwise."""
    inputs = [x.clone().requires_grad_() for x in (V, basis(2), E)]
    weights = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    got = torch.autograd.grad(weights @ torch.stack(terms(*inputs)), inputs, create_graph=keep)
    expected = torch.autograd.grad(weights @ torch.stack(plain(*inputs)), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_under_torch_func() -> None:
    U = basis(2)

    def f(V: Tensor) -> Tensor:
        return torch.stack(terms(V, U, E)).sum()

    def g(V: Tensor) -> Tensor:
        return torch.stack(plain(V, U, E)).sum()

    torch.testing.assert_close(torch.func.grad(f)(V), torch.func.grad(g)(V))
    torch.testing.assert_close(torch.func.hessian(f)(V), torch.func.hessian(g)(V))
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(V), torch.func.hessian(g)(V))
    several = torch.stack([V, 2.0 * V, V + torch.eye(N, dtype=torch.float64)])
    torch.testing.assert_close(torch.func.vmap(f)(several), torch.stack([g(v) for v in several]))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(f))(several), torch.func.vmap(torch.func.grad(g))(several)
    )


def test_not_positive_definite() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        terms(V - 100.0 * torch.eye(N, dtype=torch.float64), basis(1), E)
