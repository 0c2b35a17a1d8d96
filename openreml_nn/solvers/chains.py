r"""A symmetric matrix of the effects of the rest as a chain of blocks, with a border where some meet many others.

In a field trial a block of plots shares genotypes with a few other blocks, and an order of the effects (reverse
Cuthill–McKee) brings all elements other than zero next to the diagonal: cut into blocks of that width the matrix M is
block tridiagonal. With C_t its block beside the diagonal, and K_t the inverse of what the blocks before leave of its
block t on the diagonal, M_tt − C_{t−1}'K_{t−1}C_{t−1}, those elements of M⁻¹ that are in the same blocks follow from
the last block to the first,

    (M⁻¹)_{t,t+1} = −U_t (M⁻¹)_{t+1,t+1},   (M⁻¹)_{t,t} = K_t + U_t (M⁻¹)_{t+1,t+1} U_t',   U_t = K_t C_t,

and no others are asked for. Effects that meet many others, as genotypes that are in all trials, make no chain; they are
put into a border of columns B with a block D, and with Z = M⁻¹B the inverse Φ of D − B'Z is their part of the whole
inverse, −ZΦ that beside the border, and M⁻¹ + ZΦZ' what becomes of the chain.

Sources: George & Liu (1981), Computer Solution of Large Sparse Positive Definite Systems; for the inverse Takahashi,
Fagan & Chin (1973), Proceedings of the 8th PICA Conference, 63-69.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from openreml_nn.solvers.layouts import DenseLayout, Factor, Layout, checked
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

    def dense_inverse(self) -> Tensor:
        return self.solve(torch.eye(self.layout.size, dtype=self.X.dtype, device=self.X.device))


class BorderedLayout(Layout):
    """A chain, and after it the rows of a border: its product with the chain, row by row, and its own block.

    Args:
        chain: Layout of the rows that are not in the border, numbered from 0 in their order.
        border: The rows of A that are, shape (h,).
        size: q.
    """

    def __init__(self, chain: ChainLayout, border: Tensor, size: int) -> None:
        self.chain, self.own, self.size, self.breadth = chain, DenseLayout(len(border)), size, len(border)
        self.lengths = [chain.length, chain.size * self.breadth, self.own.length]
        self.length = sum(self.lengths)
        self.among = torch.zeros(size, dtype=torch.bool, device=border.device)
        self.among[border] = True
        self.rows = torch.cat([(~self.among).nonzero()[:, 0], border])  # those of the chain, then those of the border
        self.number = torch.empty_like(self.rows)  # of each row of A among those of the chain, or of the border
        self.number[self.rows[: chain.size]] = torch.arange(chain.size, device=border.device)
        self.number[border] = torch.arange(self.breadth, device=border.device)

    def split(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chain, its product with the border, shape (q − h, h), and the border's own block."""
        chain, beside, own = A.split(self.lengths)
        return chain, beside.view(self.chain.size, self.breadth), own

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        i, j = self.number.index_select(0, row), self.number.index_select(0, column)
        one, other = self.among.index_select(0, row), self.among.index_select(0, column)
        none = torch.zeros_like(i)
        in_chain = self.chain.place(torch.where(one, none, i), torch.where(other, none, j))
        beside = self.lengths[0] + torch.where(one, j * self.breadth + i, i * self.breadth + j)
        own = self.length - self.own.length + self.own.place(torch.maximum(i, j), torch.minimum(i, j))
        return torch.where(one & other, own, torch.where(one | other, beside, in_chain))

    def whole(self, A: Tensor) -> Tensor:
        chain, beside, own = self.split(A)
        return torch.cat([self.chain.whole(chain), beside.reshape(-1), self.own.whole(own)])

    def matrix(self, A: Tensor) -> SparseMatrix:
        chain, beside, own = self.split(A)
        of_chain, of_border = self.rows[: self.chain.size], self.rows[self.chain.size :]
        row, column, value = self.chain.elements(chain)
        i, j = beside.nonzero().unbind(1)
        k, m = own.view(self.breadth, -1).nonzero().unbind(1)
        rows = [of_chain[row], of_chain[i], of_border[j], of_border[k]]
        columns = [of_chain[column], of_border[j], of_chain[i], of_border[m]]
        values = [value, beside[i, j], beside[i, j], own.view(self.breadth, -1)[k, m]]
        return sparse_matrix(torch.cat(rows), torch.cat(columns), torch.cat(values), (self.size, self.size))

    def join(self, of_chain: Tensor, of_border: Tensor) -> Tensor:
        """Rows in the order of A."""
        both = torch.cat([of_chain, of_border])
        return torch.empty_like(both).index_copy_(0, self.rows, both)

    def diagonal(self, A: Tensor) -> Tensor:
        chain, _, own = self.split(A)
        return self.join(self.chain.diagonal(chain), self.own.diagonal(own))

    def set_diagonal(self, A: Tensor, values: Tensor) -> None:
        chain, _, own = self.split(A)
        of_chain, of_border = values.index_select(0, self.rows).split([self.chain.size, self.breadth])
        self.chain.set_diagonal(chain, of_chain)
        self.own.set_diagonal(own, of_border)

    def row_sums(self, A: Tensor) -> Tensor:
        chain, beside, own = self.split(A)
        return self.join(self.chain.row_sums(chain) + beside.sum(1), self.own.row_sums(own) + beside.sum(0))

    def dense(self, A: Tensor) -> Tensor:
        return self.matrix(self.whole(A)).to_dense()

    def factor(self, A: Tensor) -> "BorderedFactor":
        return BorderedFactor(self, A)

    @property
    def work(self) -> float:
        h = self.breadth
        return self.chain.work + h * self.chain.size * (7.0 * self.chain.width + 2.0 * h) + h**3

    @property
    def calls(self) -> int:
        return self.chain.calls + 15

    @property
    def cost(self) -> str:
        size = f"{self.size} effects, {self.breadth} of which meet many others, and the others in a chain"
        return f"{self.work:.1e} multiplications for {size} of T = {self.chain.count} blocks of b = {self.chain.width}"


class BorderedFactor(Factor):
    """The factor of the chain M, Z = M⁻¹B, and the factor of D − B'Z."""

    def __init__(self, layout: BorderedLayout, A: Tensor) -> None:
        self.layout = layout
        chain, self.B, own = layout.split(A)
        self.chain = layout.chain.factor(chain)
        self.Z = self.chain.solve(self.B)
        self.own = layout.own.factor(own - (self.B.mT @ self.Z).view(-1))
        self.pivots = layout.join(self.chain.pivots, self.own.pivots)

    def solve(self, rhs: Tensor) -> Tensor:
        of_chain, of_border = rhs.index_select(0, self.layout.rows).split([len(self.Z), self.layout.breadth])
        inner = self.own.solve(of_border - self.Z.mT @ of_chain)
        return self.layout.join(self.chain.solve(of_chain) - self.Z @ inner, inner)

    def inverse(self) -> Tensor:
        own, layout = self.own.inverse(), self.layout.chain
        ZPhi = self.Z @ own.view(self.layout.breadth, -1)
        left, right = layout.split(ZPhi), layout.split(self.Z).mT
        following = torch.cat([right[2:], right[-1:]])
        chain = self.chain.inverse() + torch.cat([left @ right, left[:-1] @ following]).view(-1)
        return torch.cat([chain, -ZPhi.view(-1), own])

    def dense_inverse(self) -> Tensor:
        return self.solve(torch.eye(self.layout.size, dtype=self.Z.dtype, device=self.Z.device))
