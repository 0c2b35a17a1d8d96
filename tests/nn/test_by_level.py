"""Closed forms by level: values and gradients against dense algebra, also of levels without rows."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from openreml_nn.nn.by_level import LevelTerms, OneEffect


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ones", [True, False])
def test_one_effect(shared, ones):
    codes, L, m = torch.tensor([0, 2, 0, 3, 2]), 5, 5
    f, y = (torch.randn(m, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sigma2 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    S = torch.rand(() if shared else L, dtype=torch.float64).requires_grad_()
    x = None if ones else torch.randn(m, dtype=torch.float64)

    def loss(f, y, sigma2, S):
        return OneEffect.apply(f, y, sigma2, S if shared else S[codes], codes, x, L)

    z = torch.nn.functional.one_hot(codes, L) * (torch.ones(m) if x is None else x)[:, None].double()
    V = z @ torch.diag(S.expand(L)) @ z.mT + sigma2 * torch.eye(m, dtype=torch.float64)
    expected = -torch.distributions.MultivariateNormal(f, V).log_prob(y) / m
    assert loss(f, y, sigma2, S).item() == pytest.approx(expected.item(), abs=1e-12)
    assert gradcheck(loss, (f, y, sigma2, S))


def test_one_effect_in_the_types_and_shapes_of_its_input():
    codes = torch.tensor([0, 1, 0])
    f = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    y = torch.ones(3, dtype=torch.float32, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    loss = OneEffect.apply(f, y, one, one, codes, None, 2)
    assert loss.dtype == torch.float64
    loss.backward()
    assert (f.grad.dtype, f.grad.shape) == (torch.bfloat16, (3, 1))
    assert (y.grad.dtype, y.grad.shape) == (torch.float32, (3,))
    torch.testing.assert_close(f.grad.float()[:, 0], -y.grad, rtol=0.01, atol=0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("s", [1, 2, 3])
def test_several_effects(shared, s):
    codes, L, m = torch.tensor([0, 2, 0, 3, 2, 0, 2]), 4, 7
    F = torch.randn(m, 2, dtype=torch.float64, requires_grad=True)
    sigma2 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    W = torch.randn(s, s, 1 if shared else L, dtype=torch.float64, requires_grad=True)
    x = torch.randn(m, s, dtype=torch.float64)

    def both(F, sigma2, W):
        S = torch.einsum("abl,cbl->acl", W, W)
        return LevelTerms.apply(F, sigma2, S, codes, x, L)

    Z = (x[:, :, None] * torch.nn.functional.one_hot(codes, L)[:, None]).reshape(m, -1)
    S = torch.einsum("abl,cbl->acl", W, W).expand(s, s, L)
    G = torch.einsum("abl,lk->albk", S, torch.eye(L, dtype=torch.float64)).reshape(s * L, s * L)
    V = Z @ G @ Z.mT + sigma2 * torch.eye(m, dtype=torch.float64)
    logdet, products = both(F, sigma2, W)
    torch.testing.assert_close(logdet, torch.logdet(V), rtol=0, atol=1e-12)
    torch.testing.assert_close(products, F.mT @ torch.linalg.solve(V, F), rtol=0, atol=1e-12)
    assert gradcheck(both, (F, sigma2, W))


def test_no_variance_is_fine():
    codes, y = torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = OneEffect.apply(torch.zeros(3), y, one, zero, codes, None, 2)
    assert 6.0 * value.item() - 3.0 * math.log(2.0 * math.pi) == pytest.approx(14.0)
    value.backward()
    assert 6.0 * zero.grad.item() == pytest.approx(2.0 + 1.0 - 9.0 - 9.0)
