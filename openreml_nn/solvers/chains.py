r"""A symmetric matrix of the effects of the rest as a chain of blocks.

In a field trial a block of plots shares genotypes with a few other blocks, and an order of the effects (reverse
Cuthill–McKee) brings all elements other than zero next to the diagonal: cut into blocks of that width the matrix M is
block tridiagonal. With C_t its block beside the diagonal, and K_t the inverse of what the blocks before leave of its
block t on the diagonal, M_tt − C_{t−1}'K_{t−1}C_{t−1}, those elements of M⁻¹ that are in the same blocks follow from
the last block to the first,

    (M⁻¹)_{t,t+1} = −U_t (M⁻¹)_{t+1,t+1},   (M⁻¹)_{t,t} = K_t + U_t (M⁻¹)_{t+1,t+1} U_t',   U_t = K_t C_t,

and no others are asked for.

Sources: George & Liu (1981), Computer Solution of Large Sparse Positive Definite Systems; for the inverse Takahashi,
Fagan & Chin (1973), Proceedings of the 8th PICA Conference, 63-69.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from openreml_nn.solvers.layouts import Factor, Layout, checked
from openreml_nn.solvers.sparse import SparseMatrix, sparse_matrix
from openreml_nn.solvers.threads import one_thread

WIDE = 128  # width of a block from which several threads are quicker than one


class ChainLayout(Layout):
    """T = 2 h + 1 blocks of width b on the diagonal, and T − 1 beside it, of A in another order.

    A chain is factored from both ends to its middle, two blocks a step: the blocks of step t are kept at 2 t and
    2 t + 1, the one in the middle at 2 h. A block is coupled with the one two places after it, the last two with the
    middle. Rows that fill up the blocks are coupled with none.

    Args:
        order: The row of A at each place of the chain, shape (q,).
        width: b.
    """

    def __init__(self, order: Tensor, width: int) -> None:
        self.size, self.width = len(order), width
        self.steps = max(1, -(-self.size // width) // 2)
        self.count = 2 * self.steps + 1
        self.length = (2 * self.count - 1) * width * width
        at = torch.arange(self.size, device=order.device)
        block, last = at // width, self.count - 1
        kept = torch.where(block <= self.steps, 2 * block, 2 * (last - block) + 1)
        self.position = torch.empty_like(order)
        self.position[order] = kept * width + at % width
        self.block, self.inner = self.position // width, self.position % width
        self.rows = order[:1].repeat(self.count * width)  # a filling row copies another
        self.rows[self.position] = at

    def threads(self) -> AbstractContextManager[None]:
        """As many as pay."""
        return one_thread() if self.width < WIDE else nullcontext()

    def blocks(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks on the diagonal, shape (T, b, b), and those of each block with its next, shape (T − 1, b, b)."""
        return A.view(-1, self.width, self.width).split([self.count, self.count - 1])

    def by_step(self, parts: Tensor) -> Tensor:
        """Two parts a step, shape (h, 2, …)."""
        return parts.view(self.steps, 2, *parts.shape[1:])

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        b = self.width
        block, other = self.block.index_select(0, row), self.block.index_select(0, column)
        inner, outer = self.inner.index_select(0, row), self.inner.index_select(0, column)
        turned = block < other  # the column comes later than the row
        this = torch.where(turned, block, other)
        inside = torch.maximum(inner, outer) * b + torch.minimum(inner, outer)
        beside = torch.where(turned, inner * b + outer, outer * b + inner) + (self.count * b * b)
        return this * (b * b) + torch.where(block == other, inside, beside)

    def split(self, x: Tensor) -> Tensor:
        """Rows of x, shape (q, m), by block, shape (T, b, m)."""
        return x.index_select(0, self.rows).view(self.count, self.width, -1)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of ``split``."""
        return parts.view(self.count * self.width, -1).index_select(0, self.position)

    def whole(self, A: Tensor) -> Tensor:
        own, beside = self.blocks(A)
        return torch.cat([own.tril() + own.tril(-1).mT, beside]).view(-1)

    def _add_beside(self, out: Tensor, to_this: Tensor, to_next: Tensor) -> Tensor:
        """``out``, by block, with what the blocks beside the diagonal give to their rows and to their columns."""
        out[:-1] += to_this
        out[2:-1] += to_next[:-2]
        out[-1] += to_next[-2:].sum(0)
        return out

    def elements(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of the elements other than zero, for A whole."""
        own, beside = (blocks.nonzero() for blocks in self.blocks(A))
        following = (beside[:, 0] + 2).clamp(max=self.count - 1)

        def rows(block: Tensor, place: Tensor) -> Tensor:
            return self.rows[block * self.width + place]

        inside = rows(own[:, 0], own[:, 1]), rows(own[:, 0], own[:, 2])
        this, other = rows(beside[:, 0], beside[:, 1]), rows(following, beside[:, 2])
        row, column = torch.cat([inside[0], this, other]), torch.cat([inside[1], other, this])
        return row, column, A.index_select(0, self.place(row, column))

    def matrix(self, A: Tensor) -> SparseMatrix:
        return sparse_matrix(*self.elements(A), (self.size, self.size))

    def diagonal(self, A: Tensor) -> Tensor:
        return self.blocks(A)[0].diagonal(dim1=1, dim2=2).reshape(-1).index_select(0, self.position)

    def set_diagonal(self, A: Tensor, values: Tensor) -> None:
        own = self.blocks(A)[0].diagonal(dim1=1, dim2=2)
        own.copy_(values.index_select(0, self.rows).view(own.shape))

    def row_sums(self, A: Tensor) -> Tensor:
        own, beside = self.blocks(A)
        sums = own.tril().sum(2) + own.tril(-1).sum(1)
        return self.join(self._add_beside(sums, beside.sum(2), beside.sum(1)))[:, 0]

    def dense(self, A: Tensor) -> Tensor:
        row, column, value = self.elements(self.whole(A))
        return A.new_zeros((self.size, self.size)).index_put_((row, column), value)

    def factor(self, A: Tensor) -> "ChainFactor":
        with self.threads():
            return ChainFactor(self, A)

    @property
    def work(self) -> float:
        return 8.0 * self.count * self.width**3

    @property
    def calls(self) -> int:
        return 5 * self.count

    @property
    def cost(self) -> str:
        T, b = self.count, self.width
        return (
            f"8 T b³ = {self.work:.1e} multiplications for {self.size} effects in a chain of T = {T} blocks of b = {b}"
        )


class ChainFactor(Factor):
    """X_t, the inverse Cholesky factor of what is left of each block, K_t = X_t'X_t, and U_t = K_t C_t by step."""

    def __init__(self, layout: ChainLayout, A: Tensor) -> None:
        self.layout = layout
        own, C = layout.blocks(A)
        columns, Y = torch.empty_like(own), torch.empty_like(C)  # LAPACK writes L by columns
        info = torch.empty(layout.count, dtype=torch.int32, device=A.device)
        given = zip(*(layout.by_step(x).unbind() for x in (own[:-1], columns[:-1].mT, info[:-1], C, Y)), strict=True)
        before: Tensor | None = None
        for left, L, failed, coupling, y in given:
            left = left if before is None else torch.baddbmm(left, before.mT, before, alpha=-1.0)
            torch.linalg.cholesky_ex(left, out=(L, failed))
            before = torch.linalg.solve_triangular(L, coupling, upper=False, out=y)
        torch.linalg.cholesky_ex(own[-1:] - (y.mT @ y).sum(0), out=(columns[-1:].mT, info[-1:]))
        L = checked(columns.mT, info)
        self.pivots = L.diagonal(dim1=1, dim2=2).reshape(-1).index_select(0, layout.position).square()
        self.X = torch.linalg.solve_triangular(L, torch.eye(layout.width, dtype=A.dtype, device=A.device), upper=False)
        self.U = layout.by_step(self.X[:-1].mT @ Y)

    def _steps(self, parts: Tensor) -> list[Tensor]:
        """By step, shapes (2, b, m), and at last the middle, shape (1, b, m)."""
        return [*self.layout.by_step(parts[:-1]).unbind(), parts[-1:]]

    def solve(self, rhs: Tensor) -> Tensor:
        with self.layout.threads():
            parts = self.layout.split(rhs)
            last, *steps, middle = self._steps(parts)
            for this, U in zip(steps, self.U[:-1].mT.unbind(), strict=True):
                last = this.baddbmm_(U, last, alpha=-1.0)
            middle -= (self.U[-1].mT @ last).sum(0)
            parts = self.X.mT @ (self.X @ parts)
            *steps, middle = self._steps(parts)
            following = middle.expand(2, -1, -1)
            for this, U in zip(reversed(steps), reversed(self.U.unbind()), strict=True):
                following = this.baddbmm_(U, following, alpha=-1.0)
            return self.layout.join(parts)

    def inverse(self) -> Tensor:
        with self.layout.threads():
            own, beside = self.X.mT @ self.X, torch.empty_like(self.U)
            *steps, middle = self._steps(own)
            following = middle.expand(2, -1, -1)
            for this, U, product in reversed([*zip(steps, self.U.unbind(), beside.unbind(), strict=True)]):
                torch.bmm(U, following, out=product)
                following = this.baddbmm_(product, U.mT)
            return torch.cat([own, beside.neg_().flatten(0, 1)]).view(-1)
