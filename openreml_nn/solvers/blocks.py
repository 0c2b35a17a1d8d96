"""The block solver: V block diagonal after sorting rows, by subject for one, each pattern of block factored once.

Several processes share the rows by block; what they tell each other at an evaluation are sums of p² + k² numbers.
"""

from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.structures import IncidenceMatrix
from openreml_nn.solvers.base import Evaluation, NotPositiveDefinite, Problem, Solver, along_free, where_it_fails
from openreml_nn.solvers.block_pattern import BlockGroup, BlockPattern, block_sizes, find_pattern, linking_designs
from openreml_nn.solvers.block_terms import backwards, block_factor, forwards
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.terms import RandomTerm
from openreml_nn.solvers.threads import threads_for


class BlockSolver(Solver):
    """Factor V block by block: Σ mᵢ³ operations over the blocks that differ, mᵢ their numbers of rows."""

    name = "blocks"

    def refusal(self, V: Matrix) -> str | None:
        designs = linking_designs(V)
        if isinstance(designs, str):
            return designs
        n, largest = V.shape[0], int(block_sizes(V).max())
        if not are_small(largest, n):
            names = " and ".join(repr(name) for name, _ in designs if name) or "V"
            return f"it needs blocks of rows that are small, and {names} correlate {largest} of {n} rows in one block."
        return None

    def cost(self, V: Matrix) -> str:
        sizes = block_sizes(V).astype(float)
        return (f"at most Σ m³ = {(sizes**3).sum():.1e} multiplications for {len(sizes)} blocks of m ≤ "
                f"{sizes.max():.0f} rows, equal blocks once")  # fmt: skip

    def whole_terms(self, V: Matrix) -> list[str] | None:
        designs = linking_designs(V)
        return None if isinstance(designs, str) else [name for name, _ in designs]

    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "BlockProblem":
        self.require(V)
        return self.prepare_shared(V, y, X, ALONE, rank=rank)

    def prepare_shared(
        self, V: Matrix, y: Tensor, X: Tensor | None, ranks: Ranks, *, rank: str = "drop"
    ) -> "BlockProblem":
        fixed = prepare_fixed_effects(y, X, rank, ranks)
        return ranks.together(lambda: BlockProblem(V, fixed))


def are_small(largest: int, n: int) -> bool:
    """Whether it is worth while to take n rows apart into blocks of which the largest has so many."""
    return 2 * largest <= n


class BlockProblem(Problem):
    """The blocks of V, and U and e in their order."""

    def __init__(self, V: Matrix, fixed: FixedEffects, pattern: BlockPattern | None = None) -> None:
        super().__init__(V, fixed)
        self.pattern = find_pattern(V).to(fixed.e.device) if pattern is None else pattern
        elements, computed, rows = len(self.pattern.element), self.pattern.elements.shape[1], len(self.pattern.order)
        needed = (6 + V.num_params) * elements + (8 + 4 * V.num_params) * computed + 4 * rows * (fixed.p + 1)
        require_memory(8 * needed, fixed.e.device, f"V of {self.n} observations in blocks of {elements} elements")
        self.F = self.pattern.spread(torch.cat([fixed.U, fixed.e[:, None]], dim=1))

    def _with(self, fixed: FixedEffects) -> "BlockProblem":
        return BlockProblem(self.V, fixed, self.pattern)

    def threads(self) -> AbstractContextManager[None]:
        pattern = self.pattern
        numbers = len(pattern.element) + self.F.shape[0] * (self.F.shape[1] + self.V.num_params)
        return threads_for(numbers, len(pattern.element) * max(group.first.shape[1] for group in pattern.groups))

    def elements(self, theta: Tensor) -> Tensor:
        """The elements of V(θ) that differ, shape (D,)."""
        return self.V.entries(theta, *self.pattern.elements)

    def blocks(self, theta: Tensor) -> list[Tensor]:
        """The blocks of V(θ) that differ, shape (P, m, m) for each group."""
        return self.pattern.blocks(self.elements(theta))

    def evaluate(self, theta: Tensor | None = None) -> "BlockEvaluation":
        return BlockEvaluation(self, self.V.theta if theta is None else theta)


class BlockEvaluation(Evaluation):
    """V = L L' by blocks, at one θ."""

    problem: BlockProblem

    def __init__(self, problem: BlockProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        try:
            blocks = problem.blocks(problem.ranks.shared(theta))
            terms, factor = block_factor(problem.pattern, problem.F, blocks, problem.ranks)
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefinite(_no_factor(problem, theta)) from error
        self.logdet_V, logdet_M, self.yPy = terms
        self.logdet_XtViX = logdet_M + problem.fixed.logdet_RtR
        self.factor, self.gamma = factor, factor.gamma

    @cached_property
    def gamma_cov(self) -> Tensor:  # type: ignore[override]
        return torch.cholesky_inverse(self.factor.Lm)

    @cached_property
    def _Pe(self) -> Tensor:
        """P y in the order of the groups, shape (N, 1)."""
        return backwards(self.problem.pattern, self.factor.L, self.factor.w).detach()

    @property
    def Py(self) -> Tensor:
        return self._Pe[self.problem.pattern.place, 0]

    def solve(self, rhs: Tensor) -> Tensor:
        return self._rows(self._half(rhs))

    def project(self, rhs: Tensor) -> Tensor:
        W = self._half(rhs)
        return self._rows(W - self.factor.Q @ self.problem.ranks.sum(self.factor.Q.mT @ W))

    def inner(self, rhs: Tensor) -> Tensor:
        W = self._half(rhs)
        whole, q = self.problem.ranks.sums(W.mT @ W, self.factor.Q.mT @ W)
        return whole - q.mT @ q

    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        W = self._half(rhs)
        whole, q = self.problem.ranks.sums(W.square().sum(0), self.factor.Q.mT @ W)
        return whole - q.square().sum(0)

    def working_variates(self) -> Tensor:
        pattern = self.problem.pattern
        derivatives = along_free(self.problem.V, self.theta, self.problem.elements)
        parts = [
            (dV @ Pe).reshape(len(dV), -1)
            for dV, Pe in zip(pattern.blocks(derivatives.mT), pattern.split(self._Pe), strict=True)
        ]
        return torch.cat(parts, dim=1)[:, pattern.place].mT

    def explained_variance(self, term: RandomTerm) -> Tensor:
        Z = term.Z
        assert isinstance(Z, IncidenceMatrix)
        L = Z.num_levels
        blocks = term.G.level_blocks(term.G_params, L)
        assert blocks is not None
        by_effect = blocks.transpose(0, 1).reshape(-1, blocks.shape[2])
        with torch.no_grad():
            ZG = Z.matmul(term.Z_params, by_effect)  # covariance of each row with the effects of its level, (n, s)
            total = ZG.new_zeros((L, ZG.shape[1]))
            parts = zip(self.problem.pattern.groups, self.factor.L, self.problem.pattern.split(self.factor.Q),
                        strict=True)  # fmt: skip
            for group, chol, Q in parts:
                level, value = _explained_in_group(group, Z.codes, ZG, chol, Q)
                total.index_add_(0, level.clamp(min=0), value * (level >= 0)[:, None])
        return self.problem.ranks.sum_unless_own(term.name, total.mT.reshape(-1))

    def _half(self, rhs: Tensor) -> Tensor:
        """L⁻¹ ``rhs``, from rows to the order of the groups."""
        return forwards(self.problem.pattern, self.factor.L, self.problem.pattern.spread(rhs))

    def _rows(self, W: Tensor) -> Tensor:
        """L'⁻¹ ``W``, from the order of the groups to rows."""
        return backwards(self.problem.pattern, self.factor.L, W)[self.problem.pattern.place]


def _explained_in_group(group: BlockGroup, codes: Tensor, ZG: Tensor, L: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of a term in the blocks of a group, shape (k,), −1 for none, and what is explained of them, (k, s)."""
    (P, m, r), s = group.rows.shape, ZG.shape[1]
    level = torch.cat([codes, codes.new_full((1,), -1)])[group.rows]
    same = level[:, :, None, 0] == level[:, None, :, 0]
    earliest = same.to(torch.uint8).argmax(2)  # the first row of a block with the level of each row
    is_first = earliest == torch.arange(m, device=codes.device)
    local = (is_first.cumsum(1) - 1).gather(1, earliest)
    count = int(is_first.sum(1).max())
    member = local[:, :, None] == torch.arange(count, device=codes.device)  # (P, m, count)
    C = (member[..., None] * ZG[group.first][:, :, None]).reshape(P, m, count * s)
    W = torch.linalg.solve_triangular(L, C, upper=False)
    fixed = (Q.reshape(P, m, -1).mT @ W).reshape(P, r, -1, count, s).square().sum(2)
    value = W.square().sum(1).reshape(P, 1, count, s) - fixed
    first_row = member.to(torch.uint8).argmax(1)  # (P, count)
    levels = level.gather(1, first_row[:, :, None].expand(P, count, r))
    levels = torch.where(member.any(1)[:, :, None], levels, -1)
    return levels.mT.reshape(-1), value.reshape(-1, s)


def _no_factor(problem: BlockProblem, theta: Tensor) -> str:
    with torch.no_grad():
        infos = [torch.linalg.cholesky_ex(V).info for V in problem.blocks(theta.detach())]
    where = ""
    for group, info in zip(problem.pattern.groups, infos, strict=True):
        if bool(info.any()):
            worst = int(info.ne(0).nonzero()[0])
            rows = group.first[worst].sort().values.tolist()
            shown = ", ".join(map(str, rows[:5])) + ", …" * (len(rows) > 5)
            levels = [f"{name or 'level'} {Z.levels[int(Z.codes[rows[0]])]!r}"
                      for name, Z in problem.pattern.designs if int(Z.codes[rows[0]]) >= 0]  # fmt: skip
            of = f" of {levels[0]}" if levels else ""
            where = f"its block{of}, rows {shown}, has no Cholesky factor beyond {int(info[worst]) - 1} rows"
            break
    places = [told for told in problem.ranks.objects(where) if told]
    where = places[0] if places else "X'V⁻¹X has no Cholesky factor"
    return (f"V is not positive definite at {where_it_fails(problem, theta)}: {where}. "
            f"Is there a residual variance, and do no two rows of a level have the same residual?")  # fmt: skip
