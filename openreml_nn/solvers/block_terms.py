r"""The three numbers of a Gaussian likelihood from the diagonal blocks of V, with their derivatives in closed form.

Each pattern of block is factored once, V_b = L L', and serves all its copies. The gradient with respect to V_b is that
of `gaussian_terms`, cut to the block and summed over the copies: for a log|V| + b log|U'V⁻¹U| + c e'Pe it is

    L'⁻¹ (a r I − b Σ Q Q' − c Σ w w') L⁻¹,   Q = L⁻¹U M^{−½},   w = L⁻¹(e − U γ̂),   M = U'V⁻¹U,

r the number of copies and the sums over them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import solve_triangular

from openreml_nn.solvers.block_pattern import BlockPattern


@dataclass(frozen=True)
class BlockFactor:
    """V = L L' by blocks, and what follows from it.

    Attributes:
        pattern: The blocks.
        L: Cholesky factor of each group, shape (P, m, m).
        Q: L⁻¹U M^{−½}, in the order of the groups, shape (N, p).
        w: L⁻¹(e − U γ̂), shape (N, 1).
        Lm: Cholesky factor of M = U'V⁻¹U, shape (p, p).
        gamma: γ̂, shape (p,).
    """

    pattern: BlockPattern
    L: list[Tensor]
    Q: Tensor
    w: Tensor
    Lm: Tensor
    gamma: Tensor

    @classmethod
    def of(cls, pattern: BlockPattern, F: Tensor, blocks: list[Tensor]) -> "BlockFactor":
        """Factor the blocks; F is [U e] in the order of the groups, shape (N, p + 1)."""
        L = [torch.linalg.cholesky(V) for V in blocks]
        W = forwards(pattern, L, F)
        W, w = W[:, :-1], W[:, -1:]
        Lm = torch.linalg.cholesky(W.mT @ W)
        Q = solve_triangular(Lm.mT, W, upper=True, left=False)
        t = Q.mT @ w
        return cls(pattern, L, Q, w - Q @ t, Lm, solve_triangular(Lm.mT, t, upper=True)[:, 0])

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log|V|, log|U'V⁻¹U|, e'Pe)."""
        logdets = [(L.diagonal(dim1=1, dim2=2).log().sum(1) * group.copies).sum()
                   for L, group in zip(self.L, self.pattern.groups, strict=True)]  # fmt: skip
        return 2.0 * torch.stack(logdets).sum(), 2.0 * self.Lm.diagonal().log().sum(), self.w.square().sum()

    def gradients(self, a: Tensor | float, b: Tensor | float, c: Tensor | float) -> list[Tensor]:
        """∂(a log|V| + b log|U'V⁻¹U| + c e'Pe)/∂V of each group, shape (P, m, m)."""
        pattern, result = self.pattern, []
        parts = zip(self.L, pattern.groups, pattern.split(self.Q), pattern.split(self.w), strict=True)
        for L, group, Q, w in parts:
            diagonal = torch.diag_embed((a * group.copies)[:, None].expand(group.first.shape))
            outer = solve_triangular(L.mT, diagonal - b * (Q @ Q.mT) - c * (w @ w.mT), upper=True)
            result.append(solve_triangular(L, outer, upper=False, left=False))
        return result

    def gradient_of_F(self, b: Tensor | float, c: Tensor | float) -> Tensor:
        """The derivative with respect to [U e], shape (N, p + 1)."""
        half = torch.cat([solve_triangular(self.Lm, self.Q, upper=False, left=False), self.w], dim=1)
        both = backwards(self.pattern, self.L, half)
        Pe = both[:, -1:]
        return torch.cat([2.0 * b * both[:, :-1] - 2.0 * c * Pe * self.gamma, 2.0 * c * Pe], dim=1)


def forwards(pattern: BlockPattern, L: list[Tensor], flat: Tensor) -> Tensor:
    """L⁻¹ times (N, k), rows in the order of the groups."""
    parts = [solve_triangular(l, part, upper=False) for l, part in zip(L, pattern.split(flat), strict=True)]
    return pattern.join(parts, flat.shape[1])


def backwards(pattern: BlockPattern, L: list[Tensor], flat: Tensor) -> Tensor:
    """L'⁻¹ times (N, k), rows in the order of the groups."""
    parts = [solve_triangular(l.mT, part, upper=True) for l, part in zip(L, pattern.split(flat), strict=True)]
    return pattern.join(parts, flat.shape[1])


class BlockTerms(Function):
    """(log|V|, log|U'V⁻¹U|, e'Pe) and, not differentiable, (Q, w, Lm, γ̂, L…), by inputs pattern, [U e] and the blocks.

    A second derivative factors the blocks again, by operations that automatic differentiation follows.
    """

    @staticmethod
    def forward(ctx: Any, pattern: BlockPattern, F: Tensor, *blocks: Tensor) -> Any:
        factor = BlockFactor.of(pattern, F, list(blocks))
        aside = (factor.Q, factor.w, factor.Lm, factor.gamma, *factor.L)
        ctx.pattern = pattern
        ctx.mark_non_differentiable(*aside)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(F, *blocks, *aside)
        return (*factor.terms(), *aside)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pattern, count = ctx.pattern, len(ctx.pattern.groups)
        F, blocks, (Q, w, Lm, gamma), L = _cut(ctx.saved_tensors, 1, count, 4, count)
        a, b, c = (0.0 if grad is None else grad for grad in grads[:3])
        if torch.is_grad_enabled():
            factor = BlockFactor.of(pattern, F[0], blocks)
        else:
            factor = BlockFactor(pattern, L, Q, w, Lm, gamma)
        gF = factor.gradient_of_F(b, c) if ctx.needs_input_grad[1] else None
        return None, gF, *factor.gradients(a, b, c)


def block_factor(pattern: BlockPattern, F: Tensor, blocks: list[Tensor]) -> tuple[tuple[Tensor, ...], BlockFactor]:
    """The three terms, differentiable in every mode of autograd, and the factor."""
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (F, *blocks)):
        factor = BlockFactor.of(pattern, F, blocks)
        return factor.terms(), factor
    terms = BlockTerms.apply(pattern, F, *blocks)
    three, (Q, w, Lm, gamma), L = _cut(terms, 3, 4, len(blocks))
    return tuple(three), BlockFactor(pattern, L, Q, w, Lm, gamma)


def _cut(values: tuple[Tensor, ...], *sizes: int) -> list[list[Tensor]]:
    """Consecutive pieces of a tuple."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
