"""Cross-products of [Z X y], made once: what the mixed-model equations need of the n rows, and nothing else of them.

The random term with the most levels comes first and is kept as one small block for each level; the other terms ("the
rest") are one symmetric matrix, dense or a chain of blocks. What couples the two is sparse where each level of the
first term meets few columns of the rest, as students meet few of all lecturers.

Where several processes share the rows, either each has levels of its own of the first term, and products of its own
rows; or each has the products of all rows, which are added up once.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix
from openreml_nn.solvers.layouts import DenseLayout, Layout
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.orders import MOST_REPEATED, choose_layout
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.sparse import SparseMatrix, by_rows, order_of

DENSE_SHARE = 0.15  # share of pairs of columns that meet in a level above which the coupling is kept dense
FEW_ELEMENTS = 2**20  # 8 MiB
Column = tuple[Tensor, Tensor]  # of B_T: where the element of each row is, and the element


@dataclass(frozen=True)
class CrossProducts:
    """Products of B = [B₁ B_T], the designs of the first term and of the rest, and F = [U e], weighted by R₀⁻¹.

    L is the number of levels of the first term (0 if there is none), s its effects a level, q the columns of the rest
    and f those of F.

    Attributes:
        first: Blocks of B₁'R₀⁻¹B₁, shape (s, s, L).
        first_F: B₁'R₀⁻¹F by level, shape (s, f, L).
        coupling: B₁'R₀⁻¹B_T.
        rest: B_T'R₀⁻¹B_T in the layout of the coupling, whole.
        rest_F: B_T'R₀⁻¹F, shape (q, f).
        FF: F'R₀⁻¹F, shape (f, f).
    """

    first: Tensor
    first_F: Tensor
    coupling: "Coupling"
    rest: Tensor
    rest_F: Tensor
    FF: Tensor

    @property
    def layout(self) -> Layout:
        """How symmetric matrices of the rest are kept."""
        return self.coupling.layout

    @cached_property
    def rest_matrix(self) -> Tensor | SparseMatrix:
        """B_T'R₀⁻¹B_T, shape (q, q), for products."""
        return self.layout.matrix(self.rest)


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
        chain: Whether the rest may be kept as a chain of blocks.
        ranks: The processes of which each has levels of its own; the layout is one for all of them.
    """

    def __init__(self, level: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int, int],
                 chain: bool = False, ranks: Ranks = ALONE) -> None:  # fmt: skip
        self.level, self.column, self.value, self.shape = level, column, value, shape
        s, L, q = shape
        sizes = torch.bincount(level, minlength=L)
        self.C = by_rows(sizes.repeat(s), column.repeat(s), value.reshape(-1), (s * L, q))
        self.C_transposed = self.C.T
        right, counts = _pairs_below(sizes)
        places = column.to(torch.int32) if q * q < 2**31 else column
        row, other = places.repeat_interleave(counts), places.index_select(0, right)
        self.layout: Layout = _one_layout(row, other, q, ranks) if chain else DenseLayout(q)
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
        return _sum_at(self.column, self.value.square().sum(0), self.shape[2])

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


def _one_layout(row: Tensor, column: Tensor, q: int, ranks: Ranks) -> Layout:
    """The layout for elements (row, column) of the rest, of all processes together."""
    if ranks.size == 1:
        return choose_layout(row, column, q)
    if ranks.count(len(row)) > MOST_REPEATED * q * q:
        return DenseLayout(q)
    places = torch.cat(ranks.gather((row * q + column).unique())).unique()
    return choose_layout(places // q, places % q, q)


def cross_products(
    first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None, chain: bool = False,
    ranks: Ranks = ALONE, own: bool = False,
) -> CrossProducts:  # fmt: skip
    """One pass over the rows.

    Args:
        first: Design of the first term, or None.
        rest: Designs of the other terms; dense where they are not level codes.
        F: U and e, shape (n, f).
        weight: 1/R₀, shape (n,); None for ones.
        chain: Whether the rest may be kept as a chain of blocks.
        ranks: The processes that share the rows.
        own: Whether each of them has levels of its own of the first term; the products are then those of its rows.
    """
    weighted = F if weight is None else weight[:, None] * F
    s, L, q = _shape(first, rest)
    by_codes, empty, columns = _are_codes(rest), F.new_zeros(0), _columns_of_rest(rest, F)
    codes, x, wx = _by_level(first, F, weight)
    of_first, of_F = _sums(codes, wx, [x, F], L)
    coupling = (
        _sparse_or_dense(codes, wx, columns, (s, L, q), chain, ranks, own) if by_codes and L and q
        else _dense(codes, wx, rest, (s, L, q), ALONE if own else ranks)
    )  # fmt: skip
    _require_elements(6 * coupling.layout.length, F, ranks, f"The system of {q} effects beside the largest term")
    of_rest = _products_of_columns(columns, F, weight, coupling.layout)
    products = [
        of_first,
        of_F,
        of_rest if by_codes else _with_dense_designs(of_rest.view(q, q), rest, F, weight).view(-1),
        torch.cat([Z.rmatmul(empty, weighted) for Z in rest]) if rest else F.new_zeros((0, F.shape[1])),
        F.mT @ weighted,
    ]
    of_first, of_F, of_rest, rest_F, FF = products if own else ranks.sums(*products)
    return CrossProducts(of_first, of_F, coupling, of_rest, rest_F, FF)


def with_columns(
    products: CrossProducts, first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None,
    ranks: Ranks = ALONE, own: bool = False,
) -> CrossProducts:  # fmt: skip
    """The same products with another F, arguments as of ``cross_products``; those of the designs are not made again."""
    weighted, empty, f = F if weight is None else weight[:, None] * F, F.new_zeros(0), F.shape[1]
    s, _, L = products.first.shape
    others = [
        F.new_zeros((s, f, 0)) if first is None else first.rmatmul(empty, weighted).view(s, L, f).transpose(1, 2),
        torch.cat([Z.rmatmul(empty, weighted) for Z in rest]) if rest else F.new_zeros((0, f)),
        F.mT @ weighted,
    ]
    of_F, rest_F, FF = others if own else ranks.sums(*others)
    return CrossProducts(products.first, of_F, products.coupling, products.rest, rest_F, FF)


def layout_of(
    first: IncidenceMatrix | None, rest: list[Matrix], like: Tensor, ranks: Ranks = ALONE, own: bool = False
) -> Layout:
    """How the rest of independent effects is kept; ``like`` has the dtype and the device of the data."""
    shape = _shape(first, rest)
    if not _are_codes(rest) or 0 in shape:
        return DenseLayout(shape[2])
    codes, _, x = _by_level(first, like, None)
    return _sparse_or_dense(codes, x, _columns_of_rest(rest, like), shape, True, ranks, own).layout


def _shape(first: IncidenceMatrix | None, rest: list[Matrix]) -> tuple[int, int, int]:
    """(s, L, q)."""
    s, L = (1, 0) if first is None else (len(first.effects), first.num_levels)
    return s, L, sum(Z.shape[1] for Z in rest)


def _are_codes(designs: list[Matrix]) -> bool:
    return all(isinstance(Z, IncidenceMatrix) for Z in designs)


def _by_level(first: IncidenceMatrix | None, like: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first term: level of each row, values of its effects, shape (n, s), and these times 1/R₀."""
    if first is None:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros((0, 1)), like.new_zeros((0, 1))
    x = first.effect_values(like)
    return first.columns(0), x, x if weight is None else weight[:, None] * x


def _pairs_below(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For entries in the order of levels of these sizes: the entries up to each in its level, and how many they are."""
    index = torch.int32 if int((sizes * (sizes + 1) // 2).sum()) < 2**31 else torch.int64
    entry = torch.arange(int(sizes.sum()), dtype=index, device=sizes.device)
    start = (sizes.cumsum(0) - sizes).to(index).repeat_interleave(sizes)
    counts = entry - start + 1
    ends = counts.cumsum(0)
    right = torch.arange(int(ends[-1]) if len(ends) else 0, dtype=index, device=sizes.device)
    return right.sub_((ends - counts - start).to(index).repeat_interleave(counts)), counts


def _sums(codes: Tensor, left: Tensor, rights: list[Tensor], count: int) -> list[Tensor]:
    """Σ left_i right_i' over the rows of each level, shape (columns of left, columns of right, count), by rights."""
    if not count:
        return [right.new_zeros((left.shape[1], right.shape[1], 0)) for right in rights]
    sizes, order = order_of(codes, count)
    left = left if order is None else left[order]
    rows = torch.arange(len(codes), dtype=torch.int32, device=codes.device) if order is None else order
    by_level = [by_rows(sizes, rows, x.contiguous(), (count, len(codes))) for x in left.mT]
    return [torch.stack([(Z @ right).mT for Z in by_level]) for right in rights]


def _sum_at(place: Tensor, values: Tensor, count: int) -> Tensor:
    """Σ of the values at each place, shape (count,)."""
    return values.new_zeros(count).index_add_(0, place, values)


def _columns_of_rest(rest: list[Matrix], F: Tensor) -> list[Column]:
    """Column of B_T and value of each row, one pair for each effect of each design by level codes."""
    pairs, offset = [], 0
    for Z in rest:
        if isinstance(Z, IncidenceMatrix):
            values = Z.effect_values(F)
            pairs += [(offset + Z.columns(a), values[:, a]) for a in range(values.shape[1])]
        offset += Z.shape[1]
    return pairs


def _dense(codes: Tensor, wx: Tensor, rest: list[Matrix], shape: tuple[int, int, int], ranks: Ranks) -> DenseCoupling:
    """The coupling of any designs, added up over the processes."""
    _require_elements(3 * math.prod(shape), wx, ranks, f"The products of {shape[1]} levels with {shape[2]} effects")
    C = wx.new_zeros(shape)
    if C.numel():
        B_T = torch.cat([Z.build(wx[:0, 0]) for Z in rest], dim=1)
        for own, x in zip(C, wx.mT, strict=True):
            own.index_add_(0, codes, x[:, None] * B_T)
    return DenseCoupling(ranks.sum(C))


def _sparse_or_dense(codes: Tensor, wx: Tensor, columns: list[Column], shape: tuple[int, int, int],
                     chain: bool, ranks: Ranks, own: bool) -> Coupling:  # fmt: skip
    """The coupling where every design is level codes."""
    _, L, q = shape
    keys = torch.cat([codes * q + column for column, _ in columns])
    keys, value = _added(keys, torch.cat([wx.mT * value for _, value in columns], dim=1))
    if ranks.size > 1 and not own:
        keys, value = _added(torch.cat(ranks.gather(keys)), torch.cat(ranks.gather(value.mT)).mT)
    level, column = keys // q, keys % q
    levels = ranks if own else ALONE
    pairs = levels.count(int(torch.bincount(level, minlength=L).square().sum()))
    if pairs > DENSE_SHARE * levels.count(L) * q * q:
        _require_elements(3 * math.prod(shape), wx, levels, f"The products of {L} levels with {q} effects")
        C = wx.new_zeros(shape)
        C[:, level, column] = value
        return DenseCoupling(C)
    return SparseCoupling(level, column, value, shape, chain, levels)


def _require_elements(count: int, like: Tensor, ranks: Ranks, what: str) -> None:
    """Raise a MemoryError on all processes where one has no room for so many numbers; a few always have it."""
    ranks.together(lambda: require_memory(8 * count, like.device, what) if count > FEW_ELEMENTS else None)


def _added(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that occur, sorted, and the sums of the values of each, shape (s, number of keys)."""
    keys, entry = keys.unique(return_inverse=True)
    return keys, torch.stack([_sum_at(entry, row, len(keys)) for row in values])


def _products_of_columns(columns: list[Column], F: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
    """B_T'R₀⁻¹B_T of the designs by level codes, pair by pair of effects, each product of a row at its place."""
    A = F.new_zeros(layout.length)
    for i, (column, x) in enumerate(columns):
        for other, z in columns[: i + 1]:
            A.index_add_(0, layout.place(column, other), x * z if weight is None else weight * x * z)
    return layout.whole(A)


def _with_dense_designs(A: Tensor, rest: list[Matrix], F: Tensor, weight: Tensor | None) -> Tensor:
    """B_T'R₀⁻¹B_T, given for pairs of designs by level codes, with the products of the other pairs filled in."""
    offsets = [0]
    for Z in rest:
        offsets.append(offsets[-1] + Z.shape[1])
    empty = F.new_zeros(0)
    for i, Z in enumerate(rest):
        for j, other in enumerate(rest[: i + 1]):
            if isinstance(Z, IncidenceMatrix) and isinstance(other, IncidenceMatrix):
                continue
            dense, light = (other, Z) if isinstance(Z, IncidenceMatrix) else (Z, other)
            D = dense.build(empty)
            block = light.rmatmul(empty, D if weight is None else weight[:, None] * D)
            block = block if light is Z else block.mT
            A[offsets[i] : offsets[i + 1], offsets[j] : offsets[j + 1]] = block
            A[offsets[j] : offsets[j + 1], offsets[i] : offsets[i + 1]] = block.mT
    return A
