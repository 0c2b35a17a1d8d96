"""Cross-products of [Z X y], made once: what the mixed-model equations need of the n rows, and nothing else of them.

The random term with the most levels comes first and is kept as one small block for each level; the other terms ("the
rest") are one symmetric matrix, dense or sparse: a band, or a chain of blocks, which may have a border.

Where several processes share the rows, either each has levels of its own of the first term, and products of its own
rows; or each has the products of all rows, which are added up once.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix
from openreml_nn.solvers.couplings import Coupling, DenseCoupling, SparseCoupling, sum_at
from openreml_nn.solvers.layouts import DenseLayout, Layout
from openreml_nn.solvers.memory import require_memory
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
    coupling: Coupling
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


def cross_products(
    first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None, sparse: bool = False,
    ranks: Ranks = ALONE, own: bool = False,
) -> CrossProducts:  # fmt: skip
    """One pass over the rows.

    Args:
        first: Design of the first term, or None.
        rest: Designs of the other terms; dense where they are not level codes.
        F: U and e, shape (n, f).
        weight: 1/R₀, shape (n,); None for ones.
        sparse: Whether what is kept of the rest need not be dense.
        ranks: The processes that share the rows.
        own: Whether each of them has levels of its own of the first term; the products are then those of its rows.
    """
    s, L, q = _shape(first, rest)
    by_codes, columns = _are_codes(rest), _columns_of_rest(rest, F)
    codes, x, wx = _by_level(first, F, weight)
    of_first, of_F = _sums(codes, wx, [x, F], L)
    coupling = (
        _sparse_or_dense(codes, wx, columns, (s, L, q), sparse, ranks, own) if by_codes and L and q
        else _dense(codes, wx, rest, (s, L, q), ALONE if own else ranks)
    )  # fmt: skip
    _require_elements(6 * coupling.layout.length, F, ranks, f"The system of {q} effects beside the largest term")
    of_rest = _products_of_columns(columns, F, weight, coupling.layout)
    of_rest = of_rest if by_codes else _with_dense_designs(of_rest.view(q, q), rest, F, weight).view(-1)
    products = [of_first, of_F, of_rest, *_of_columns(rest, F, weight)]
    of_first, of_F, of_rest, rest_F, FF = products if own else ranks.sums(*products)
    return CrossProducts(of_first, of_F, coupling, of_rest, rest_F, FF)


def with_columns(
    products: CrossProducts, first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None,
    ranks: Ranks = ALONE, own: bool = False,
) -> CrossProducts:  # fmt: skip
    """The same products with another F, arguments as of ``cross_products``; those of the designs are not made again."""
    codes, _, wx = _by_level(first, F, weight)
    others = [*_sums(codes, wx, [F], products.first.shape[2]), *_of_columns(rest, F, weight)]
    of_F, rest_F, FF = others if own else ranks.sums(*others)
    return CrossProducts(products.first, of_F, products.coupling, products.rest, rest_F, FF)


def _of_columns(rest: list[Matrix], F: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """B_T'R₀⁻¹F and F'R₀⁻¹F."""
    weighted, empty = F if weight is None else weight[:, None] * F, F.new_zeros(0)
    of_rest = [Z.rmatmul(empty, weighted) for Z in rest]
    return torch.cat(of_rest) if rest else F.new_zeros((0, F.shape[1])), F.mT @ weighted


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


def _sums(codes: Tensor, left: Tensor, rights: list[Tensor], count: int) -> list[Tensor]:
    """Σ left_i right_i' over the rows of each level, shape (columns of left, columns of right, count), by rights."""
    if not count:
        return [right.new_zeros((left.shape[1], right.shape[1], 0)) for right in rights]
    sizes, order = order_of(codes, count)
    left = left if order is None else left[order]
    rows = torch.arange(len(codes), dtype=torch.int32, device=codes.device) if order is None else order
    by_level = [by_rows(sizes, rows, x.contiguous(), (count, len(codes))) for x in left.mT]
    return [torch.stack([(Z @ right).mT for Z in by_level]) for right in rights]


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
                     sparse: bool, ranks: Ranks, own: bool) -> Coupling:  # fmt: skip
    """The coupling where every design is level codes."""
    _, L, q = shape
    known = (wx != 0).any(1)
    met = [_rows_with(known & (value != 0)) for _, value in columns]
    keys = torch.cat([_some(codes * q + column, rows) for (column, _), rows in zip(columns, met, strict=True)])
    values = [_some(wx.mT * value, rows) for (_, value), rows in zip(columns, met, strict=True)]
    keys, value = _added(keys, torch.cat(values, dim=1))
    beside = _met_beside(~known, columns, q) if sparse else keys[:0]
    if ranks.size > 1 and not own:
        keys, value = _added(torch.cat(ranks.gather(keys)), torch.cat(ranks.gather(value.mT)).mT)
        beside = torch.cat(ranks.gather(beside))
    level, column = keys // q, keys % q
    levels = ranks if own else ALONE
    pairs = levels.count(int(torch.bincount(level, minlength=L).square().sum()))
    if pairs > DENSE_SHARE * levels.count(L) * q * q:
        _require_elements(3 * math.prod(shape), wx, levels, f"The products of {L} levels with {q} effects")
        C = wx.new_zeros(shape)
        C[:, level, column] = value
        return DenseCoupling(C)
    return SparseCoupling(level, column, value, shape, beside if sparse else None, levels)


def _rows_with(holds: Tensor) -> Tensor | None:
    """The rows where something holds; None for all."""
    return None if bool(holds.all()) else holds.nonzero()[:, 0]


def _some(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some elements along the last dimension; None for all."""
    return x if rows is None else x.index_select(-1, rows)


def _met_beside(unknown: Tensor, columns: list[Column], q: int) -> Tensor:
    """Places i q + j of the pairs of columns that meet in rows of no level of the first term."""
    alone = _rows_with(unknown)
    places = [columns[0][0][:0]]
    if alone is None or len(alone):
        for k, (column, value) in enumerate(columns):
            for other, more in columns[:k]:
                both = _some(value * more, alone) != 0
                places.append((_some(column, alone) * q + _some(other, alone))[both])
    return torch.cat(places).unique()


def _require_elements(count: int, like: Tensor, ranks: Ranks, what: str) -> None:
    """Raise a MemoryError on all processes where one has no room for so many numbers; a few always have it."""
    ranks.together(lambda: require_memory(8 * count, like.device, what) if count > FEW_ELEMENTS else None)


def _added(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that occur, sorted, and the sums of the values of each, shape (s, number of keys)."""
    keys, entry = keys.unique(return_inverse=True)
    return keys, torch.stack([sum_at(entry, row, len(keys)) for row in values])


def _products_of_columns(columns: list[Column], F: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
    """B_T'R₀⁻¹B_T of the designs by level codes, pair by pair of effects, each product of a row at its place."""
    A = F.new_zeros(layout.length)
    for i, (column, x) in enumerate(columns):
        for other, z in columns[: i + 1]:
            product = x * z if weight is None else weight * x * z
            rows = _rows_with(product != 0)  # others may have no place
            A.index_add_(0, layout.place(_some(column, rows), _some(other, rows)), _some(product, rows))
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
