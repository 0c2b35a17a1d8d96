"""How the effects of the first term are coupled with those of the rest: C = B₁'R₀⁻¹B_T, dense or sparse.

It is sparse where each level of the first term meets few columns of the rest, as students meet few of all lecturers.
What an evaluation needs of it are products, and sums over the levels of the first term that go where two columns meet.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from openreml_nn.solvers.layouts import DenseLayout, Layout
from openreml_nn.solvers.orders import SPARSE_SHARE, choose_layout, distinct
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.sparse import by_rows


class Coupling(ABC):
    """C = B₁'R₀⁻¹B_T as blocks C_l of shape (s, q), one for each level l of the first term.

    Attributes:
        layout: How symmetric matrices of size q are kept that have elements where two columns meet in a level.
    """

    layout: Layout

    @abstractmethod
    def numel(self) -> int:
        """Numbers that are kept of it."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Sums of the squares of the columns, shape (q,)."""

    @abstractmethod
    def to_rest(self, blocks: Tensor) -> Tensor:
        """Σ_l C_l' ``blocks``_l, shape (q, m), for blocks of shape (s, m, L)."""

    @abstractmethod
    def to_first(self, rest: Tensor) -> Tensor:
        """C_l ``rest`` for each level, shape (s, m, L), for ``rest`` of shape (q, m)."""

    @abstractmethod
    def schur(self, A: Tensor, K: Tensor) -> Tensor:
        """A − Σ_l C_l' K_l C_l by its lower triangle, for A in the layout and symmetric K of shape (s, s, L)."""

    @abstractmethod
    def within(self, Phi: Tensor) -> Tensor:
        """C_l Φ C_l' for each level, shape (s, s, L), for Φ in the layout, whole."""


class DenseCoupling(Coupling):
    """All of C, given as shape (s, L, q)."""

    def __init__(self, C: Tensor) -> None:
        self.C, self.layout = C, DenseLayout(C.shape[2])

    def numel(self) -> int:
        return self.C.numel()

    def squares(self) -> Tensor:
        return self.C.square().sum((0, 1))

    def to_rest(self, blocks: Tensor) -> Tensor:
        return self.C.flatten(0, 1).mT @ blocks.transpose(1, 2).flatten(0, 1)

    def to_first(self, rest: Tensor) -> Tensor:
        return (self.C @ rest).transpose(1, 2)

    def schur(self, A: Tensor, K: Tensor) -> Tensor:
        KC = torch.einsum("abl,blq->alq", K, self.C)
        return A - (self.C.flatten(0, 1).mT @ KC.flatten(0, 1)).view(-1)

    def within(self, Phi: Tensor) -> Tensor:
        CPhi = self.C @ Phi.view(self.layout.size, -1)
        return torch.stack([torch.stack([(left * right).sum(1) for right in self.C]) for left in CPhi])


class SparseCoupling(Coupling):
    """The columns of C_l that are not zero: entry e is column ``column[e]`` of level ``level[e]``.

    Args:
        level: Level of each entry, shape (m,), sorted.
        column: Column of the rest of each entry, shape (m,), sorted within a level.
        value: Values, shape (s, m).
        shape: (s, L, q).
        beside: Places i q + j of the elements of the rest that no level of the first term has; None where the rest has
            to be dense, because its effects are correlated.
        ranks: The processes of which each has levels of its own; the layout is one for all of them.
    """

    def __init__(self, level: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int, int],
                 beside: Tensor | None = None, ranks: Ranks = ALONE) -> None:  # fmt: skip
        self.level, self.column, self.value, self.shape = level, column, value, shape
        s, L, q = shape
        sizes = torch.bincount(level, minlength=L)
        self.C = by_rows(sizes.repeat(s), column.repeat(s), value.reshape(-1), (s * L, q))
        self.C_transposed = self.C.T
        right, counts = _pairs_below(sizes)
        places = column.to(torch.int32) if q * q < 2**31 else column
        row, other = places.repeat_interleave(counts), places.index_select(0, right)
        self.layout: Layout = DenseLayout(q) if beside is None else _one_layout(row, other, beside, q, ranks)
        place, last = self.layout.place(row, other), counts.cumsum(0) - 1
        once = [a.repeat_interleave(counts) * b.index_select(0, right) for a in value for b in value]
        both = [(2.0 * product).index_copy_(0, last, product[last]) for product in once]  # of both triangles
        of_levels, size = (sizes * (sizes + 1) // 2).repeat(s * s), (s * s * L, self.layout.length)
        place = place if s == 1 else place.repeat(s * s)
        self.to_levels = by_rows(of_levels, place, both[0] if s == 1 else torch.cat(both), size)
        of_places = by_rows(of_levels, place, once[0] if s == 1 else torch.cat(once), size)
        self.to_places, self.filled = of_places.filled_columns()

    def numel(self) -> int:
        return len(self.to_levels.values)

    def squares(self) -> Tensor:
        return sum_at(self.column, self.value.square().sum(0), self.shape[2])

    def to_rest(self, blocks: Tensor) -> Tensor:
        return self.C_transposed @ blocks.transpose(1, 2).flatten(0, 1)

    def to_first(self, rest: Tensor) -> Tensor:
        s, L, _ = self.shape
        return (self.C @ rest).view(s, L, -1).transpose(1, 2)

    def schur(self, A: Tensor, K: Tensor) -> Tensor:
        return A.clone().index_add_(0, self.filled, self.to_places @ K.reshape(-1), alpha=-1.0)

    def within(self, Phi: Tensor) -> Tensor:
        s, L, _ = self.shape
        blocks = (self.to_levels @ Phi).view(s, s, L)
        return blocks if s == 1 else 0.5 * (blocks + blocks.transpose(0, 1))


def _one_layout(row: Tensor, column: Tensor, beside: Tensor, q: int, ranks: Ranks) -> Layout:
    """The layout for elements (row, column) of the rest and those at places ``beside``, of all processes together."""
    if len(beside):
        row, column = torch.cat([row, beside // q]), torch.cat([column, beside % q])
    if ranks.size == 1:
        return choose_layout(row, column, q)
    row, column = distinct(row, column, q)
    most = ranks.largest(torch.tensor(len(row), device=row.device))
    if int(most) > SPARSE_SHARE * q * q:
        return DenseLayout(q)
    places = torch.cat(ranks.gather(row.to(torch.int64) * q + column)).unique()
    return choose_layout(places // q, places % q, q)


def _pairs_below(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For entries in the order of levels of these sizes: the entries up to each in its level, and how many they are."""
    index = torch.int32 if int((sizes * (sizes + 1) // 2).sum()) < 2**31 else torch.int64
    entry = torch.arange(int(sizes.sum()), dtype=index, device=sizes.device)
    start = (sizes.cumsum(0) - sizes).to(index).repeat_interleave(sizes)
    counts = entry - start + 1
    ends = counts.cumsum(0)
    right = torch.arange(int(ends[-1]) if len(ends) else 0, dtype=index, device=sizes.device)
    return right.sub_((ends - counts - start).to(index).repeat_interleave(counts)), counts


def sum_at(place: Tensor, values: Tensor, count: int) -> Tensor:
    """Σ of the values at each place, shape (count,)."""
    return values.new_zeros(count).index_add_(0, place, values)
