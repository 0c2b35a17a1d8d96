r"""log|V| and F'V⁻¹F where V = Z (S ⊗ I) Z' + σ²I: level by level, in closed form.

With A_l = Z_l'Z_l and T_l = Z_l'F of the rows of a level, K_l = S(σ²I + A_l S)⁻¹ and N_l = (σ²I + A_l S)⁻¹ σ²,

    log|V| = m log σ² + Σ_l log|I + A_l S/σ²|,   F'V⁻¹F = (F'F − Σ_l T_l'K_l T_l) / σ²,
    Z'V⁻¹Z = N A/σ²,   Z'V⁻¹F = N T/σ²,

which costs one pass over the rows and nothing that grows with the number of levels that the rows do not have.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from openreml_nn.solvers.small_blocks import eliminate, multiply


class OneEffect(Function):
    r"""−ℓ per row of y ~ N(f, V) with one effect for each level, once differentiable with respect to f, y, σ² and S.

    ``OneEffect.apply(f, y, sigma2, S, codes, x, L)`` takes f and y of shape (m,) or (m, 1) and any floating-point type,
    σ² of shape (), S of shape (), or (m,) where each level has its own, the level of each row, shape (m,), below L, and
    the values of the effect, shape (m,), or None for ones. The gradient is cheap beside the value and is made with it;
    it comes in the type of f. The step of a small network has time for few operations: so this is all in one.
    """

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, y: Tensor, sigma2: Tensor, S: Tensor, codes: Tensor, x: Tensor | None, L: int
    ) -> Tensor:
        m = len(f)
        r = y.reshape(-1) - f.reshape(-1).to(torch.float64)
        rows = torch.arange(m, device=r.device)
        place = codes.new_empty(L).scatter_(0, codes, rows)
        own = place.gather(0, codes)  # a row of each level stands for it: the levels at hand, without sorting
        A = r.new_zeros(m).index_add_(0, own, torch.ones_like(r) if x is None else x * x)
        T = r.new_zeros(m).index_add_(0, own, r if x is None else r * x)
        D = torch.addcmul(sigma2, A, S)
        NT = T / D
        fitted = (NT * S).index_select(0, own)
        Vir = (r - (fitted if x is None else fitted * x)) / sigma2
        quadratic = r @ Vir
        if any(ctx.needs_input_grad):
            gS = A / D - NT * NT
            gS = gS if S.ndim else gS.sum()
            gs = (m - quadratic - (gS @ S if S.ndim else gS * S)) / sigma2
            ctx.save_for_backward(Vir, gs, gS)
            ctx.like = [(part.shape, part.dtype) for part in (f, y)]
        return (D.log().sum() + (quadratic + m * math.log(2.0 * math.pi))) * (0.5 / m)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivative()
        Vir, gs, gS = ctx.saved_tensors
        each = grads[0] / len(Vir)
        gf, gy = (
            (Vir * (sign * each)).to(dtype).view(shape) if needed else None
            for sign, needed, (shape, dtype) in zip((-1.0, 1.0), ctx.needs_input_grad, ctx.like, strict=False)
        )
        return gf, gy, gs * (0.5 * each), gS * (0.5 * each), None, None, None


class LevelTerms(Function):
    r"""(log|V|, F'V⁻¹F), once differentiable with respect to F, σ² and S.

    ``LevelTerms.apply(F, sigma2, S, codes, x, L)`` takes F of shape (m, f), σ² of shape (), S of shape (s, s, 1), or
    (s, s, L) where each level has its own, the level of each row, shape (m,), below L, and the values of the s effects,
    shape (m, s), or None for ones.
    """

    @staticmethod
    def forward(ctx: Any, F: Tensor, sigma2: Tensor, S: Tensor, codes: Tensor, x: Tensor | None, L: int) -> Any:
        x = torch.ones_like(F[:, :1]) if x is None else x
        A, T = _products_by_level(codes, x, x, L), _products_by_level(codes, x, F, L)
        K, N, logdet = eliminate(A, S / sigma2)
        KT = multiply(K, T)
        products = (F.mT @ F - sum(t @ k.mT for t, k in zip(T, KT, strict=True))) / sigma2
        ctx.save_for_backward(F, sigma2, S, codes, x, A, T, N, KT, products)
        return len(F) * sigma2.log() + logdet, products

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivative()
        F, sigma2, S, codes, x, A, T, N, KT, products = ctx.saved_tensors
        a, H = grads
        gF = gS = gs = None
        if ctx.needs_input_grad[0]:
            fitted = (x[:, :, None] * KT.permute(2, 0, 1)[codes]).sum(1)
            gF = (F - fitted) @ (H + H.mT) / sigma2
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            NT = multiply(N, T) / sigma2
            HNT = torch.einsum("fg,sgl->sfl", H, NT)
            gS = a / sigma2 * multiply(N, A) - multiply(HNT, NT.transpose(0, 1))
            gS = gS if S.shape[2] > 1 else gS.sum(2, keepdim=True)
            gs = (a * len(F) - (H * products).sum() - (gS * S).sum()) / sigma2
        return gF, gs, gS, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "The likelihood of a batch by levels gives first derivatives only. For second derivatives take "
            "`MixedModelHead(..., mode='exact', solver='dense')`."
        )


def _products_by_level(codes: Tensor, left: Tensor, right: Tensor, count: int) -> Tensor:
    """Σ left_i right_i' over the rows of each level, shape (columns of left, columns of right, count)."""
    products = (left[:, :, None] * right[:, None]).flatten(1)
    sums = products.new_zeros((count, products.shape[1])).index_add_(0, codes, products)
    return sums.mT.reshape(left.shape[1], right.shape[1], count)
