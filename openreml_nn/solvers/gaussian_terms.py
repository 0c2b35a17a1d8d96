r"""The three numbers of a Gaussian likelihood from a dense V, with their derivatives in closed form.

log|V|, log|U'V⁻¹U| and e'Pe cost one Cholesky. Their gradients with respect to V are

    ∂log|V| = V⁻¹,   ∂log|U'V⁻¹U| = −V⁻¹U (U'V⁻¹U)⁻¹ U'V⁻¹,   ∂e'Pe = −Pe (Pe)',

so one Cholesky inverse serves every parameter (Harville 1977, JASA 72, 320-338). Automatic differentiation through a
Cholesky gives the same numbers in more than twice the time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import solve_triangular

from openreml_nn.solvers.watching import is_watched


def _in_place_allowed(*tensors: Tensor) -> bool:
    """Whether nothing records what is done to these tensors: no autograd, ``torch.func`` or batch of gradients."""
    return not torch.is_grad_enabled() and not is_watched(*tensors)


class _Inverse(Function):
    """V⁻¹ from V and its Cholesky factor; d(V⁻¹) = −V⁻¹ dV V⁻¹."""

    generate_vmap_rule = True

    @staticmethod
    def forward(V: Tensor, L: Tensor) -> Tensor:
        return torch.cholesky_inverse(L)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (Vi,) = ctx.saved_tensors
        return -Vi @ grads[0] @ Vi, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (Vi,) = ctx.saved_tensors
        return -Vi @ tangents[0] @ Vi


class GaussianTerms(Function):
    r"""(log|V|, log|U'V⁻¹U|, e'Pe) and, not differentiable, (L, Q, Pe, γ̂, (U'V⁻¹U)⁻¹).

    Inputs are V of shape (n, n), of which the lower triangle is read, U of shape (n, p) and e of shape (n,). L is the
    Cholesky factor of V and QQ' = V⁻¹U (U'V⁻¹U)⁻¹ U'V⁻¹. Twice differentiable, also under ``torch.func``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(V: Tensor, U: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        L = torch.linalg.cholesky(V)
        W = solve_triangular(L, torch.cat([U, e[:, None]], dim=1), upper=False)
        W, w = W[:, :-1], W[:, -1:]
        Lm = torch.linalg.cholesky(W.mT @ W)
        Qh = solve_triangular(Lm, W.mT, upper=False).mT
        t = Qh.mT @ w
        r = w - Qh @ t
        gamma = solve_triangular(Lm.mT, t, upper=True)
        both = solve_triangular(L.mT, torch.cat([Qh, r], dim=1), upper=True)
        logdet_V = 2.0 * L.diagonal().log().sum()
        logdet_M = 2.0 * Lm.diagonal().log().sum()
        I = torch.eye(U.shape[1], dtype=V.dtype, device=V.device)
        M_inverse = torch.cholesky_solve(I, Lm)
        return logdet_V, logdet_M, r.square().sum(), L, both[:, :-1], both[:, -1], gamma[:, 0], M_inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        V, U, e = inputs
        _, _, _, L, Q, Pe, gamma, M_inverse = output
        ctx.mark_non_differentiable(L, Q, Pe, gamma, M_inverse)
        ctx.save_for_backward(V, U, e, L, Q, Pe, gamma, M_inverse)
        ctx.save_for_forward(V, U, e, L)
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        V, U, e, L, Q, Pe, gamma, M_inverse = ctx.saved_tensors
        a, b, c = grads[:3]
        if _in_place_allowed(V, U, e, a, b, c):
            gV = torch.cholesky_inverse(L).mul_(a).addmm_(Q, Q.mT * -b).addmm_(Pe[:, None], Pe[None] * -c)
            gU = None
            if ctx.needs_input_grad[1]:
                ViU = torch.cholesky_solve(U, L)
                gU = 2.0 * b * ViU @ M_inverse - 2.0 * c * torch.outer(Pe, gamma)
        else:
            Vi, ViU, M_inverse, gamma, Pe = _parts(V, U, e, L)
            gV = a * Vi - b * ViU @ M_inverse @ ViU.mT - c * torch.outer(Pe, Pe)
            gU = 2.0 * b * ViU @ M_inverse - 2.0 * c * torch.outer(Pe, gamma)
        return gV, gU, 2.0 * c * Pe

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        V, U, e, L = ctx.saved_tensors
        dV, dU, de = (torch.zeros_like(x) if t is None else t for t, x in zip(tangents, (V, U, e), strict=True))
        Vi, ViU, M_inverse, gamma, Pe = _parts(V, U, e, L)
        ViUMi = ViU @ M_inverse
        d_logdet_V = (Vi * dV).sum()
        d_logdet_M = 2.0 * (ViUMi * dU).sum() - (ViUMi * (dV @ ViU)).sum()
        d_ePe = 2.0 * Pe @ de - 2.0 * Pe @ dU @ gamma - Pe @ dV @ Pe
        return d_logdet_V, d_logdet_M, d_ePe, None, None, None, None, None


def _parts(V: Tensor, U: Tensor, e: Tensor, L: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """V⁻¹, V⁻¹U, (U'V⁻¹U)⁻¹, γ̂ and Pe as differentiable functions of V, U and e."""
    Vi = _Inverse.apply(V, L)
    ViU = Vi @ U
    M_inverse = torch.linalg.inv(U.mT @ ViU)
    gamma = M_inverse @ (ViU.mT @ e)
    return Vi, ViU, M_inverse, gamma, Vi @ (e - U @ gamma)
