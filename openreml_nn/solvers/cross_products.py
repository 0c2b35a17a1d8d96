"""Cross-products of [Z X y], made once: what the mixed-model equations need of the n rows, and nothing else of them.

The random term with the most levels comes first and is kept as one small block for each level; the other terms ("the
rest") are one dense matrix. What couples the two is sparse where each level of the first term meets few columns of the
rest, as students meet few of all lecturers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix

DENSE_SHARE = 0.15  # share of pairs of columns that meet in a level above which the coupling is kept dense


@dataclass(frozen=True)
class CrossProducts:
    """Products of B = [B₁ B_T], the designs of the first term and of the rest, and F = [U e], weighted by R₀⁻¹.

    L is the number of levels of the first term (0 if there is none), s its effects a level, q the columns of the rest
    and f those of F.

    Attributes:
        first: Blocks of B₁'R₀⁻¹B₁, shape (s, s, L).
        first_F: B₁'R₀⁻¹F by level, shape (s, f, L).
        coupling: B₁'R₀⁻¹B_T.
        rest: B_T'R₀⁻¹B_T, shape (q, q).
        rest_F: B_T'R₀⁻¹F, shape (q, f).
        FF: F'R₀⁻¹F, shape (f, f).
    """

    first: Tensor
    first_F: Tensor
    coupling: "Coupling"
    rest: Tensor
    rest_F: Tensor
    FF: Tensor


class Coupling(ABC):
    """C = B₁'R₀⁻¹B_T as blocks C_l of shape (s, q), one for each level l of the first term."""

    @abstractmethod
    def to_rest(self, blocks: Tensor) -> Tensor:
        """Σ_l C_l' ``blocks``_l, shape (q, m), for blocks of shape (s, m, L)."""

    @abstractmethod
    def to_first(self, rest: Tensor) -> Tensor:
        """C_l ``rest`` for each level, shape (s, m, L), for ``rest`` of shape (q, m)."""

    @abstractmethod
    def schur(self, K: Tensor) -> Tensor:
        """Σ_l C_l' K_l C_l, shape (q, q), for symmetric K of shape (s, s, L)."""

    @abstractmethod
    def within(self, Phi: Tensor) -> Tensor:
        """C_l Φ C_l' for each level, shape (s, s, L), for symmetric Φ of shape (q, q)."""


class DenseCoupling(Coupling):
    """All of C, given as shape (s, L, q)."""

    def __init__(self, C: Tensor) -> None:
        self.C = C

    def to_rest(self, blocks: Tensor) -> Tensor:
        return self.C.flatten(0, 1).mT @ blocks.transpose(1, 2).flatten(0, 1)

    def to_first(self, rest: Tensor) -> Tensor:
        return (self.C @ rest).transpose(1, 2)

    def schur(self, K: Tensor) -> Tensor:
        KC = torch.einsum("abl,blq->alq", K, self.C)
        return self.C.flatten(0, 1).mT @ KC.flatten(0, 1)

    def within(self, Phi: Tensor) -> Tensor:
        CPhi = self.C @ Phi
        return torch.stack([torch.stack([(left * right).sum(1) for right in self.C]) for left in CPhi])


class SparseCoupling(Coupling):
    """The columns of C_l that are not zero: entry e is column ``column[e]`` of level ``level[e]``.

    Args:
        level: Level of each entry, shape (m,), sorted.
        column: Column of the rest of each entry, shape (m,), sorted within a level.
        value: Values, shape (s, m).
        shape: (s, L, q).
    """

    def __init__(self, level: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int, int]) -> None:
        self.level, self.column, self.value, self.shape = level, column, value, shape
        left, right = _pairs_below(level, shape[1])  # of columns in order: the lower triangle of the rest
        self.pair_level = level[left]
        self.place = column[left] * shape[2] + column[right]
        self.product = value[:, None, left] * value[None, :, right]
        self.both = torch.where(left == right, self.product, 2.0 * self.product)  # of both triangles

    def to_rest(self, blocks: Tensor) -> Tensor:
        part = sum(v * block[:, self.level] for v, block in zip(self.value, blocks, strict=True))
        return torch.stack([_sum_at(self.column, row, self.shape[2]) for row in part], dim=1)

    def to_first(self, rest: Tensor) -> Tensor:
        taken = rest.mT[:, self.column]
        L = self.shape[1]
        return torch.stack([torch.stack([_sum_at(self.level, v * row, L) for row in taken]) for v in self.value])

    def schur(self, K: Tensor) -> Tensor:
        q = self.shape[2]
        part = (self.product * K[:, :, self.pair_level]).flatten(0, 1)
        lower = _sum_at(self.place, part[0] if len(part) == 1 else part.sum(0), q * q).reshape(q, q)
        return lower + lower.tril(-1).mT

    def within(self, Phi: Tensor) -> Tensor:
        L = self.shape[1]
        part = Phi.reshape(-1)[self.place] * self.both
        blocks = torch.stack([torch.stack([_sum_at(self.pair_level, x, L) for x in row]) for row in part])
        return 0.5 * (blocks + blocks.transpose(0, 1))


def cross_products(
    first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None
) -> CrossProducts:
    """One pass over the rows.

    Args:
        first: Design of the first term, or None.
        rest: Designs of the other terms; dense where they are not level codes.
        F: U and e, shape (n, f).
        weight: 1/R₀, shape (n,); None for ones.
    """
    weighted = F if weight is None else weight[:, None] * F
    q = sum(Z.shape[1] for Z in rest)
    empty = F.new_zeros(0)
    codes = F.new_zeros(0, dtype=torch.int64) if first is None else first.codes.clamp(min=0)
    L = 0 if first is None else len(first.levels)
    x = F.new_zeros((0, 1)) if first is None else first.effect_values(F)
    s = x.shape[1]
    wx = x if weight is None or first is None else weight[:, None] * x
    rows = weighted if first is not None else weighted[:0]
    columns = _columns_of_rest(rest, F)
    return CrossProducts(
        first=_sums(codes, wx, x, L),
        first_F=_sums(codes, x, rows, L),
        coupling=_coupling(codes, wx, columns, rest, (s, L, q)),
        rest=_products_of_rest(rest, F, weight, q),
        rest_F=torch.cat([Z.rmatmul(empty, weighted) for Z in rest]) if rest else F.new_zeros((0, F.shape[1])),
        FF=F.mT @ weighted,
    )


def _pairs_below(level: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions (i, j), j ≤ i, of the same level, for levels in order."""
    sizes = torch.bincount(level, minlength=count)
    position = torch.arange(len(level), device=level.device)
    start = (sizes.cumsum(0) - sizes)[level]  # of the level of each position
    pairs = position - start + 1  # of each position with those up to it
    left = position.repeat_interleave(pairs)
    shift = start - (pairs.cumsum(0) - pairs)
    return left, torch.arange(len(left), device=level.device) + shift[left]


def _sums(codes: Tensor, left: Tensor, right: Tensor, count: int) -> Tensor:
    """Σ left_i right_i' over the rows of each level, shape (columns of left, columns of right, count)."""
    return torch.stack([torch.stack([_sum_at(codes, x * z, count) for z in right.mT]) for x in left.mT])


def _sum_at(place: Tensor, values: Tensor, count: int) -> Tensor:
    """Σ of the values at each place, shape (count,)."""
    return values.new_zeros(count).index_add_(0, place, values)


def _columns_of_rest(rest: list[Matrix], F: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Column of B_T and value of each row, one pair for each effect of each term; None where a design is dense."""
    pairs, offset = [], 0
    for Z in rest:
        if not isinstance(Z, IncidenceMatrix):
            return None
        values = Z.effect_values(F)
        pairs += [(offset + Z._column(a), values[:, a]) for a in range(values.shape[1])]
        offset += Z.shape[1]
    return pairs


def _coupling(codes: Tensor, wx: Tensor, columns: list[tuple[Tensor, Tensor]] | None, rest: list[Matrix],
              shape: tuple[int, int, int]) -> Coupling:  # fmt: skip
    _, L, q = shape
    if columns is None or not L or not q:
        C = wx.new_zeros(shape)
        if L and q:
            B_T = torch.cat([Z.build(wx[:0, 0]) for Z in rest], dim=1)
            for own, x in zip(C, wx.mT, strict=True):
                own.index_add_(0, codes, x[:, None] * B_T)
        return DenseCoupling(C)
    keys = torch.cat([codes * q + column for column, _ in columns])
    values = torch.cat([wx.mT * value for _, value in columns], dim=1)
    keys, entry = keys.unique(return_inverse=True)
    value = torch.stack([_sum_at(entry, row, len(keys)) for row in values])
    level, column = keys // q, keys % q
    pairs = int(torch.bincount(level, minlength=L).square().sum())
    if pairs > DENSE_SHARE * L * q * q:
        C = wx.new_zeros(shape)
        C[:, level, column] = value
        return DenseCoupling(C)
    return SparseCoupling(level, column, value, shape)


def _products_of_rest(rest: list[Matrix], F: Tensor, weight: Tensor | None, q: int) -> Tensor:
    """B_T'R₀⁻¹B_T, by pairs of effects: scattered sums for codes, products for dense designs."""
    A = F.new_zeros((q, q))
    offsets = [0]
    for Z in rest:
        offsets.append(offsets[-1] + Z.shape[1])
    empty = F.new_zeros(0)
    for i, Z in enumerate(rest):
        for j, other in enumerate(rest[: i + 1]):
            if isinstance(other, IncidenceMatrix) and isinstance(Z, IncidenceMatrix):
                block = _incidence_product(Z, other, F, weight)
            else:
                dense, light = (other, Z) if isinstance(Z, IncidenceMatrix) else (Z, other)
                D = dense.build(empty)
                block = light.rmatmul(empty, D if weight is None else weight[:, None] * D)
                block = block if light is Z else block.mT
            A[offsets[i] : offsets[i + 1], offsets[j] : offsets[j + 1]] = block
            A[offsets[j] : offsets[j + 1], offsets[i] : offsets[i + 1]] = block.mT
    return A


def _incidence_product(left: IncidenceMatrix, right: IncidenceMatrix, F: Tensor, weight: Tensor | None) -> Tensor:
    size = left.shape[1] * right.shape[1]
    A, x, z = F.new_zeros(size), left.effect_values(F), right.effect_values(F)
    for a in range(x.shape[1]):
        for b in range(z.shape[1]):
            value = x[:, a] * z[:, b]
            A.index_add_(0, left._column(a) * right.shape[1] + right._column(b),
                         value if weight is None else weight * value)  # fmt: skip
    return A.reshape(left.shape[1], right.shape[1])
