"""A chain of blocks with a border, for effects of the rest of which some meet many others.

Effects that meet many others, as genotypes that are in all trials, make no chain. They are put into a border of columns
B with a block D; with M the chain and Z = M⁻¹B the inverse Φ of D − B'Z is their part of the whole inverse, −ZΦ that
beside the border, and M⁻¹ + ZΦZ' what becomes of the chain.

Source: George & Liu (1981), Computer Solution of Large Sparse Positive Definite Systems.
"""

import torch
from torch import Tensor

from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.layouts import DenseLayout, Factor, Layout
from openreml_nn.solvers.sparse import SparseMatrix, sparse_matrix


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
