r"""The three numbers of a Gaussian likelihood from the diagonal blocks of V, with their derivatives in closed form.

Each pattern of block is factored once, V_b = L L', and serves all its copies. The gradient with respect to V_b is that
of `gaussian_terms`, cut to the block and summed over the copies: for a log|V| + b log|U'V⁻¹U| + c e'Pe it is

    L'⁻¹ (a r I − b Σ Q Q' − c Σ w w') L⁻¹,   Q = L⁻¹U M^{−½},   w = L⁻¹(e − U γ̂),   M = U'V⁻¹U,

r the number of copies and the sums over them. Where several processes share the rows, each has whole blocks: M, the
three numbers and L⁻¹U'w are sums over all of them, everything else is of its own blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import solve_triangular

from openreml_nn.solvers.block_pattern import BlockPattern
from openreml_nn.solvers.ranks import Ranks
from openreml_nn.solvers.watching import is_watched


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
        logdet: log|V|.
        ranks: The processes that share the rows.
    """

    pattern: BlockPattern
    L: list[Tensor]
    Q: Tensor
    w: Tensor
    Lm: Tensor
    gamma: Tensor
    logdet: Tensor
    ranks: Ranks

    @classmethod
    def of(cls, pattern: BlockPattern, F: Tensor, blocks: list[Tensor], ranks: Ranks) -> "BlockFactor":
        """Factor the blocks; F is [U e] in the order of the groups, shape (N, p + 1)."""
        p = F.shape[1] - 1
        try:
            L = _cholesky(blocks)
            W = forwards(pattern, L, F)
            logdet = 2.0 * sum(_logdets(L, pattern), start=F.new_zeros(()))
            M, logdet = ranks.sums(W[:, :p].mT @ W[:, :p], logdet)
        except torch.linalg.LinAlgError:
            ranks.sums(F.new_full((p, p), torch.nan), F.new_full((), torch.nan))  # the others are told
            raise
        if ranks.size > 1 and bool(logdet.isnan()):
            raise torch.linalg.LinAlgError("A block of another process has no Cholesky factor.")
        W, w = W[:, :p], W[:, p:]
        Lm = torch.linalg.cholesky(M)
        Q = solve_triangular(ranks.shared(Lm).mT, W, upper=True, left=False)
        t = ranks.sum(Q.mT @ w)
        return cls(
            pattern, L, Q, w - Q @ ranks.shared(t), Lm, solve_triangular(Lm.mT, t, upper=True)[:, 0], logdet, ranks
        )

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log|V|, log|U'V⁻¹U|, e'Pe)."""
        return self.logdet, 2.0 * self.Lm.diagonal().log().sum(), self.ranks.sum(self.w.square().sum())

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
        Lm, gamma = self.ranks.shared(self.Lm), self.ranks.shared(self.gamma)
        half = torch.cat([solve_triangular(Lm, self.Q, upper=False, left=False), self.w], dim=1)
        both = backwards(self.pattern, self.L, half)
        Pe = both[:, -1:]
        return torch.cat([2.0 * b * both[:, :-1] - 2.0 * c * Pe * gamma, 2.0 * c * Pe], dim=1)


def forwards(pattern: BlockPattern, L: list[Tensor], flat: Tensor) -> Tensor:
    """L⁻¹ times (N, k), rows in the order of the groups."""
    parts = [solve_triangular(l, part, upper=False) for l, part in zip(L, pattern.split(flat), strict=True)]
    return pattern.join(parts, flat.shape[1])


def backwards(pattern: BlockPattern, L: list[Tensor], flat: Tensor) -> Tensor:
    """L'⁻¹ times (N, k), rows in the order of the groups."""
    parts = [solve_triangular(l.mT, part, upper=True) for l, part in zip(L, pattern.split(flat), strict=True)]
    return pattern.join(parts, flat.shape[1])


class BlockTerms(Function):
    """(log|V|, log|U'V⁻¹U|, e'Pe) and, not differentiable, (Q, w, Lm, γ̂, L…), by pattern, ranks, [U e] and the blocks.

    A second derivative factors the blocks again, by operations that automatic differentiation follows.
    """

    @staticmethod
    def forward(ctx: Any, pattern: BlockPattern, ranks: Ranks, F: Tensor, *blocks: Tensor) -> Any:
        factor = BlockFactor.of(pattern, F, list(blocks), ranks)
        aside = (factor.Q, factor.w, factor.Lm, factor.gamma, *factor.L)
        ctx.pattern, ctx.ranks = pattern, ranks
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
            a, b, c = (ctx.ranks.shared(F[0].new_zeros(()) + x) for x in (a, b, c))
            factor = BlockFactor.of(pattern, F[0], blocks, ctx.ranks)
        else:
            factor = BlockFactor(pattern, L, Q, w, Lm, gamma, F[0].new_zeros(()), ctx.ranks)
        gF = factor.gradient_of_F(b, c) if ctx.needs_input_grad[2] else None
        return None, None, gF, *factor.gradients(a, b, c)


def block_factor(
    pattern: BlockPattern, F: Tensor, blocks: list[Tensor], ranks: Ranks
) -> tuple[tuple[Tensor, ...], BlockFactor]:
    """The three terms, differentiable in every mode of autograd, and the factor."""
    if is_watched(F, *blocks):
        factor = BlockFactor.of(pattern, F, blocks, ranks)
        return factor.terms(), factor
    terms = BlockTerms.apply(pattern, ranks, F, *blocks)
    three, (Q, w, Lm, gamma), L = _cut(terms, 3, 4, len(blocks))
    return tuple(three), BlockFactor(pattern, L, Q, w, Lm, gamma, three[0].detach(), ranks)


def _cholesky(blocks: list[Tensor]) -> list[Tensor]:
    """The factors of all groups, whose success is looked at once for all, because a look waits for the device."""
    if len(blocks) < 2 or is_watched(*blocks):
        return [torch.linalg.cholesky(V) for V in blocks]
    L, failed = zip(*(torch.linalg.cholesky_ex(V) for V in blocks), strict=True)
    if bool(torch.cat(failed).any()):
        raise torch.linalg.LinAlgError("A block has no Cholesky factor.")
    return list(L)


def _logdets(L: list[Tensor], pattern: BlockPattern) -> list[Tensor]:
    """½ log|V| of the blocks of each group."""
    return [(l.diagonal(dim1=1, dim2=2).log().sum(1) * group.copies).sum()
            for l, group in zip(L, pattern.groups, strict=True)]  # fmt: skip


def _cut(values: tuple[Tensor, ...], *sizes: int) -> list[list[Tensor]]:
    """Consecutive pieces of a tuple."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
