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
from openreml_nn.covariance.structures import IncidenceMatrix

DENSE_SHARE = 0.15  # share of pairs of columns that meet in a level above which the coupling is kept dense


@dataclass(frozen=True)
class CrossProducts:
    """Products of B = [B₁ B_T], the designs of the first term and of the rest, and F = [U e], weighted by R₀⁻¹.

    L is the number of levels of the first term (0 if there is none), s its effects a level, q the columns of the rest
    and f those of F.

    Attributes:
        first: Blocks of B₁'R₀⁻¹B₁, shape (L, s, s).
        first_F: B₁'R₀⁻¹F by level, shape (L, s, f).
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
        """Σ_l C_l' ``blocks``_l, shape (q, m), for blocks of shape (L, s, m)."""

    @abstractmethod
    def to_first(self, rest: Tensor) -> Tensor:
        """C_l ``rest`` for each level, shape (L, s, m), for ``rest`` of shape (q, m)."""

    @abstractmethod
    def schur(self, K: Tensor) -> Tensor:
        """Σ_l C_l' K_l C_l, shape (q, q), for symmetric K of shape (L, s, s)."""

    @abstractmethod
    def within(self, Phi: Tensor) -> Tensor:
        """C_l Φ C_l' for each level, shape (L, s, s), for symmetric Φ of shape (q, q)."""


class DenseCoupling(Coupling):
    """All of C, shape (L, s, q)."""

    def __init__(self, C: Tensor) -> None:
        self.C = C

    def to_rest(self, blocks: Tensor) -> Tensor:
        return self.C.flatten(0, 1).mT @ blocks.flatten(0, 1)

    def to_first(self, rest: Tensor) -> Tensor:
        return (self.C.flatten(0, 1) @ rest).reshape(*self.C.shape[:2], rest.shape[1])

    def schur(self, K: Tensor) -> Tensor:
        return self.to_rest(K @ self.C)

    def within(self, Phi: Tensor) -> Tensor:
        return self.to_first(Phi) @ self.C.mT


class SparseCoupling(Coupling):
    """The columns of C_l that are not zero: entry e is column ``column[e]`` of level ``level[e]``.

    Args:
        level: Level of each entry, shape (m,), sorted.
        column: Column of the rest of each entry, shape (m,), sorted within a level.
        value: Values, shape (m, s).
        shape: (L, s, q).
    """

    def __init__(self, level: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int, int]) -> None:
        self.level, self.column, self.value, self.shape = level, column, value, shape
        left, right = _pairs_within(level, shape[0])
        low = column[left] >= column[right]  # the lower triangle of the rest
        left, right = left[low], right[low]
        self.pair_level = level[left]
        self.place = column[left] * shape[2] + column[right]
        self.product = (value[left, :, None] * value[right, None, :]).flatten(1)

    def to_rest(self, blocks: Tensor) -> Tensor:
        part = (self.value[:, None, :] @ blocks[self.level])[:, 0]
        return part.new_zeros((self.shape[2], blocks.shape[2])).index_add_(0, self.column, part)

    def to_first(self, rest: Tensor) -> Tensor:
        part = self.value[:, :, None] * rest[self.column][:, None, :]
        return part.new_zeros((self.shape[0], self.shape[1], rest.shape[1])).index_add_(0, self.level, part)

    def schur(self, K: Tensor) -> Tensor:
        q = self.shape[2]
        part = (self.product * K.flatten(1)[self.pair_level]).sum(1)
        lower = part.new_zeros(q * q).index_add_(0, self.place, part).reshape(q, q)
        return lower + lower.tril(-1).mT

    def within(self, Phi: Tensor) -> Tensor:
        L, s, _ = self.shape
        twice = Phi.tril(-1) * 2.0 + torch.diag_embed(Phi.diagonal())
        part = twice.reshape(-1)[self.place][:, None] * self.product
        blocks = part.new_zeros((L, s * s)).index_add_(0, self.pair_level, part).reshape(L, s, s)
        return 0.5 * (blocks + blocks.mT)


def cross_products(first: IncidenceMatrix | None, rest: list[Matrix], F: Tensor, weight: Tensor | None) -> CrossProducts:
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
        coupling=_coupling(codes, wx, columns, rest, (L, s, q)),
        rest=_products_of_rest(rest, F, weight, q),
        rest_F=torch.cat([Z.rmatmul(empty, weighted) for Z in rest]) if rest else F.new_zeros((0, F.shape[1])),
        FF=F.mT @ weighted,
    )


def _sums(codes: Tensor, left: Tensor, right: Tensor, count: int) -> Tensor:
    """Σ left_i right_i' over the rows of each level, shape (count, columns of left, columns of right)."""
    sums = [[_bincount(codes, left[:, a] * right[:, b], count) for b in range(right.shape[1])]
            for a in range(left.shape[1])]  # fmt: skip
    if not right.shape[1]:
        return left.new_zeros((count, left.shape[1], 0))
    return torch.stack([torch.stack(row, dim=-1) for row in sums], dim=-2)


def _bincount(codes: Tensor, values: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, codes, values)


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
    L, s, q = shape
    if columns is None or not L or not q:
        C = wx.new_zeros(shape)
        if L and q:
            B_T = torch.cat([Z.build(wx[:0, 0]) for Z in rest], dim=1)
            for a in range(s):
                C[:, a] = wx.new_zeros((L, q)).index_add_(0, codes, wx[:, a, None] * B_T)
        return DenseCoupling(C)
    keys = torch.cat([codes * q + column for column, _ in columns])
    values = torch.cat([wx * value[:, None] for _, value in columns])
    keys, entry = keys.unique(return_inverse=True)
    value = values.new_zeros((len(keys), s)).index_add_(0, entry, values)
    level, column = keys // q, keys % q
    pairs = int(torch.bincount(level, minlength=L).square().sum())
    if pairs > DENSE_SHARE * L * q * q:
        C = wx.new_zeros((L, q, s)).index_put_((level, column), value)
        return DenseCoupling(C.mT.contiguous())
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


def _pairs_within(level: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All pairs of positions with the same level, for sorted levels."""
    sizes = torch.bincount(level, minlength=count)
    size = sizes[level]
    first = (sizes.cumsum(0) - sizes)[level]
    left = torch.arange(len(level), device=level.device).repeat_interleave(size)
    step = torch.arange(len(left), device=level.device) - (size.cumsum(0) - size).repeat_interleave(size)
    return left, first.repeat_interleave(size) + step
