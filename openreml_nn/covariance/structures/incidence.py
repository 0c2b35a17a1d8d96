"""Designs of random effects as level codes: which level each row belongs to, and with what covariates.

Z has one column for each effect of each level and would be mostly zeros; kept are the codes. Effects are the slower
index: column a · L + l is effect a of level l of L.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.levels import Levels
from openreml_nn.covariance.matrix import Matrix


class IncidenceMatrix(Matrix):
    """Base class of Z given by level codes and, for each of s effects, one value per row.

    Args:
        codes: Level of each row, shape (n,), integers from 0; −1 for a row that belongs to none.
        levels: Labels of the levels, in order.
        values: Values of the effects, shape (n, s), or None for a single effect with the value 1.
        effects: Names of the effects.
    """

    codes: Tensor
    values: Tensor | None

    def __init__(self, codes: Tensor, levels: Sequence[Any], values: Tensor | None, effects: Sequence[str]) -> None:
        super().__init__((len(codes), len(levels) * len(effects)), [])
        self.labels, self.effects = list(levels), list(effects)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self._some_unknown = bool((codes < 0).any())
        self._pairs: tuple[torch.device, tuple[Tensor, Tensor] | None] | None = None

    @cached_property
    def levels(self) -> list[str]:
        """Labels of the levels, in order; made when they are asked for, since there may be many."""
        return [str(label) for label in self.labels]

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.labels)

    def _value(self, effect: int, like: Tensor) -> Tensor | None:
        """Values of one effect, shape (n,), 0 in rows of no level; None where all are 1."""
        value = None if self.values is None else self.values[:, effect].to(like.dtype)
        if not self._some_unknown:
            return value
        known = (self.codes >= 0).to(like.dtype)
        return known if value is None else known * value

    def effect_values(self, like: Tensor) -> Tensor:
        """Values of all effects, shape (n, s), 0 in rows of no level."""
        if self.values is not None and not self._some_unknown:
            return self.values.to(like.dtype)
        ones = torch.ones(self.shape[0], dtype=like.dtype, device=self.codes.device)
        values = [self._value(a, like) for a in range(len(self.effects))]
        return torch.stack([ones if value is None else value for value in values], dim=1)

    def columns(self, effect: int) -> Tensor:
        """For each row the column of Z that holds its value of an effect, shape (n,); one in rows of no level too."""
        known = self.codes.clamp(min=0) if self._some_unknown else self.codes
        return known + effect * self.num_levels if effect else known

    def where(self, keep: Tensor) -> "IncidenceMatrix":
        """The same with rows of zeros where ``keep``, shape (n,), is False."""
        masked = deepcopy(self)
        masked.codes = torch.where(keep, self.codes, -1)
        masked._some_unknown = bool((masked.codes < 0).any())
        return masked

    def build(self, params: Tensor) -> Tensor:
        Z = params.new_zeros(self.shape)
        rows = torch.arange(self.shape[0], device=self.codes.device)
        for a in range(len(self.effects)):
            value = self._value(a, params)
            Z = Z.index_put((rows, self.columns(a)), params.new_ones(()) if value is None else value)
        return Z

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        level, effect = columns % self.num_levels, columns // self.num_levels
        return (self.codes[rows] == level) * self.effect_values(params)[rows, effect]

    def diagonal(self, params: Tensor) -> Tensor:
        place = torch.arange(min(self.shape), device=self.codes.device)
        return self.entries(params, place, place)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        total: Tensor | None = None
        for a in range(len(self.effects)):
            value, part = self._value(a, rhs), rhs[self.columns(a)]
            part = part if value is None else value[:, None] * part
            total = part if total is None else total + part
        return total  # type: ignore[return-value]

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        parts = []
        for a in range(len(self.effects)):
            value = self._value(a, rhs)
            part = rhs if value is None else value[:, None] * rhs
            empty = part.new_zeros((self.num_levels, rhs.shape[1]))
            parts.append(empty.index_add(0, self.columns(0), part))
        return torch.cat(parts)

    def sandwich(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        return self._sum_over_effects(
            lambda i, j: inner.submatrix(inner_params, i, j), (slice(None), None), slice(None)
        )

    def _sum_over_effects(self, part_of: Callable[[Tensor, Tensor], Tensor], rows: Any, columns: Any) -> Tensor:
        """Elements of Z C Z' for any C, one pair of effects after the other.

        Args:
            part_of: Elements of C from the columns of Z of each row, for the effect on its left and on its right.
            rows: Index that takes the values of the rows on the left to the shape of these elements.
            columns: The same on the right.
        """
        total: Tensor | None = None
        for a, b in product(range(len(self.effects)), repeat=2):
            part = part_of(self.columns(a), self.columns(b))
            left, right = self._value(a, part), self._value(b, part)
            part = part if left is None else left[rows] * part
            part = part if right is None else part * right[columns]
            total = part if total is None else total + part
        return total  # type: ignore[return-value]

    def sandwich_diagonal(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        rows = torch.arange(self.shape[0], device=self.codes.device)
        return self.sandwich_entries(params, inner, inner_params, rows, rows)

    def sandwich_mean_diagonal(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        block = inner.common_block(inner_params, self.num_levels)
        if block is None:
            return super().sandwich_mean_diagonal(params, inner, inner_params)
        if self.values is None and len(self.effects) == 1 and not self._some_unknown:
            return block[0, 0]
        x = self.effect_values(inner_params)
        return (block * (x.mT @ x)).sum() / len(x)

    def sandwich_entries(
        self, params: Tensor, inner: Matrix, inner_params: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Through the blocks of G where effects of different levels are uncorrelated, so that G is not formed."""
        common = inner.common_block(inner_params, self.num_levels)
        blocks = inner.level_blocks(inner_params, self.num_levels) if common is None else common
        if blocks is None:
            return self._sum_over_effects(lambda i, j: inner.entries(inner_params, i[rows], j[columns]), rows, columns)
        level, other = self.codes[rows], self.codes[columns]
        same = level == other
        if self._some_unknown:
            same = same & (level >= 0)
        own = blocks if common is not None else blocks[level.clamp(min=0)]
        if self.values is None:
            return same * own[..., 0, 0]
        x = self.values.to(own.dtype)
        left, right = (x[rows][..., None, :] @ own)[..., 0, :], x[columns]
        return same * sum(left[..., a] * right[..., a] for a in range(len(self.effects)))

    def add_sandwich_to(self, out: Tensor, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        """Where effects of different levels are uncorrelated, only pairs of rows of one level are touched."""
        blocks = inner.level_blocks(inner_params, self.num_levels)
        pairs = None if blocks is None else self._pairs_of_rows()
        if blocks is None or pairs is None:
            return super().add_sandwich_to(out, params, inner, inner_params)
        i, j = pairs
        level = self.codes[i]
        if self.values is None:
            return out.index_put_((i, j), blocks[:, 0, 0][level], accumulate=True)
        x = self.values.to(out.dtype)
        left = torch.einsum("na,nab->nb", x, blocks[self.codes.clamp(min=0)])
        return out.index_put_((i, j), (left[i] * x[j]).sum(1), accumulate=True)

    def _pairs_of_rows(self) -> tuple[Tensor, Tensor] | None:
        """All pairs (i, j) of rows of the same level, None for many; kept, because they depend on the codes alone."""
        if self._pairs is None or self._pairs[0] != self.codes.device:
            sizes = torch.bincount(self.codes[self.codes >= 0], minlength=1)
            few = 8 * int(sizes.square().sum()) <= self.shape[0] ** 2
            with torch.inference_mode(False):  # a tensor made in inference mode could not serve a later gradient
                self._pairs = (self.codes.device, _pairs_of_equal(self.codes, self.num_levels) if few else None)
        return self._pairs[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pairs": None}

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"shape": self.shape, "levels": Levels(self.levels), "effects": self.effects}


def _pairs_of_equal(codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All pairs (i, j) with codes[i] = codes[j] ≥ 0, for codes below ``count``."""
    order = torch.argsort(codes, stable=True)
    order = order[codes[order] >= 0]
    left, right = pairs_within(codes[order], count)
    return order[left], order[right]


def pairs_within(level: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All pairs of positions with the same level, for sorted levels below ``count``."""
    sizes = torch.bincount(level, minlength=count)
    size = sizes[level]
    first = (sizes.cumsum(0) - sizes)[level]
    left = torch.arange(len(level), device=level.device).repeat_interleave(size)
    step = torch.arange(len(left), device=level.device) - (size.cumsum(0) - size).repeat_interleave(size)
    return left, first.repeat_interleave(size) + step
