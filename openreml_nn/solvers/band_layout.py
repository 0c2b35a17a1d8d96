r"""A symmetric matrix of the effects of the rest as a band, for the CPU, where LAPACK factors bands.

In an order of the effects (reverse Cuthill–McKee) that brings all elements other than zero next to the diagonal they
are within w places of it. The band is factored and solved with by one call of LAPACK each. Cut into blocks of w rows,
the factor L has blocks D_t on the diagonal and E_t below them, and those elements of the inverse that are within the
band follow from the last block to the first: with X_t = D_t⁻¹ and W_t = E_t X_t,

    (M⁻¹)_{t+1,t} = −(M⁻¹)_{t+1,t+1} W_t,   (M⁻¹)_{t,t} = X_t'X_t + W_t'(M⁻¹)_{t+1,t+1} W_t.

Sources: as for `chains`.
"""

import numpy as np
import torch
from torch import Tensor

from openreml_nn.solvers.band import BandFactor
from openreml_nn.solvers.layouts import Factor, Layout
from openreml_nn.solvers.sparse import SparseMatrix, sparse_matrix


class BandLayout(Layout):
    """The diagonal and w subdiagonals of A in another order, column by column: LAPACK's lower band storage.

    There are T w columns, some after the last row of A; they have a diagonal and nothing else.

    Args:
        order: The row of A at each place of the band, shape (q,).
        width: w > 0.
    """

    def __init__(self, order: Tensor, width: int) -> None:
        self.size, self.width = len(order), width
        self.count = -(-self.size // width)
        self.length = self.count * width * (width + 1)
        self.order = order
        self.position = torch.empty_like(order)
        self.position[order] = torch.arange(self.size, device=order.device)
        filling = order[:1].expand(self.count * width - self.size)  # a filling row copies another
        self.rows = torch.cat([order, filling])
        self.upper = torch.ones(width, width, dtype=torch.float64).triu()  # where blocks below the diagonal are filled

    def by_column(self, A: Tensor) -> Tensor:
        """A_{j+d,j} in row j and column d, shape (T w, w + 1)."""
        return A.view(-1, self.width + 1)

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        i, j = self.position.index_select(0, row), self.position.index_select(0, column)
        return torch.minimum(i, j) * self.width + torch.maximum(i, j)

    def whole(self, A: Tensor) -> Tensor:
        return A

    def elements(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of the elements of the lower triangle other than zero."""
        column, below = self.by_column(A)[: self.size].nonzero().unbind(1)
        value = A.index_select(0, column * (self.width + 1) + below)
        return self.order.index_select(0, column + below), self.order.index_select(0, column), value

    def matrix(self, A: Tensor) -> SparseMatrix:
        if not bool(self.by_column(A)[: self.size, 1:].any()):  # one factor, no level of which meets another
            each = torch.arange(self.size + 1)
            return SparseMatrix(each, each[:-1], self.diagonal(A), (self.size, self.size))
        row, column, value = self.elements(A)
        beside = row != column
        rows, columns = torch.cat([row, column[beside]]), torch.cat([column, row[beside]])
        return sparse_matrix(rows, columns, torch.cat([value, value[beside]]), (self.size, self.size))

    def diagonal(self, A: Tensor) -> Tensor:
        return self.by_column(A)[:, 0].index_select(0, self.position)

    def set_diagonal(self, A: Tensor, values: Tensor) -> None:
        self.by_column(A)[:, 0] = values.index_select(0, self.rows)

    def row_sums(self, A: Tensor) -> Tensor:
        below = self.by_column(A)[: self.size]
        sums = below.sum(1)
        for d in range(1, min(self.width + 1, self.size)):
            sums[d:] += below[: self.size - d, d]
        return sums.index_select(0, self.position)

    def dense(self, A: Tensor) -> Tensor:
        return self.matrix(A).to_dense()

    def factor(self, A: Tensor) -> "BandCholesky":
        return BandCholesky(self, A)

    @property
    def work(self) -> float:
        return 7.0 * self.count * self.width**3

    @property
    def calls(self) -> int:
        return 2 * self.count

    @property
    def cost(self) -> str:
        return f"7 q w² = {self.work:.1e} multiplications for q = {self.size} effects in a band of w = {self.width}"


class BandCholesky(Factor):
    """L, by LAPACK."""

    def __init__(self, layout: BandLayout, A: Tensor) -> None:
        self.layout = layout
        self.band = BandFactor(layout.by_column(A.clone()).numpy().T)
        self.L = torch.from_numpy(self.band.L.T)
        self.pivots = self.L[:, 0].index_select(0, layout.position).square()

    def solve(self, rhs: Tensor) -> Tensor:
        by_column = self.band.solve(rhs.index_select(0, self.layout.rows)).mT
        return by_column.index_select(1, self.layout.position).mT.contiguous()

    def inverse(self) -> Tensor:
        T, w, L = self.layout.count, self.layout.width, self.L
        D = L.as_strided((T, w, w), (w * (w + 1), 1, w))  # above its diagonal is what is not of it
        E = L.as_strided((T - 1, w, w), (w * (w + 1), 1, w), w) * self.layout.upper
        X = torch.linalg.solve_triangular(D, torch.eye(w, dtype=L.dtype), upper=False)
        blocks = L.new_empty(T, 2 * w, w)
        blocks[:, :w] = X.mT @ X
        blocks[-1, w:] = 0.0
        _add_later(blocks.numpy(), torch.bmm(E, X[:-1]).neg_().numpy())
        return blocks.as_strided((T, w, w + 1), (2 * w * w, w + 1, w)).reshape(-1)


def _add_later(blocks: np.ndarray, minus_W: np.ndarray) -> None:
    """Write the blocks below those on the diagonal, one above the other, shape (T, 2 w, w), and complete the latter.

    By NumPy, which starts a product in half the time of PyTorch.
    """
    w = minus_W.shape[1]
    own, below = blocks[::-1, :w], blocks[-2::-1, w:]
    later = own[0]
    for block, beside, W in zip(own[1:], below, minus_W[::-1], strict=True):
        np.dot(later, W, out=beside)
        block += np.dot(W.T, beside)
        later = block
