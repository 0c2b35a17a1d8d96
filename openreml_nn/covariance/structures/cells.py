"""Design of effects that are indexed by a factor within each group, such as repeated times within a subject."""

import torch
from torch import Tensor

from openreml_nn.covariance.levels import tensor_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.structures.dummy import DummyMatrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix


class CellMatrix(IncidenceMatrix):
    r"""Z with Z_{i, a·L + l} = 1 where row i has effect a of level l of L: one effect in each row.

    The same as a `KhatriRaoMatrix` whose values are the indicators of the effects, without keeping them.

    Args:
        cells: Effect of each row, shape (n,), integers from 0.
        dummy: The level of each row.
        effects: Names of the effects.

    Raises:
        ValueError: ``cells`` has another length or an index out of range.
    """

    cells: Tensor

    def __init__(self, cells: Tensor, dummy: DummyMatrix, effects: list[str]) -> None:
        cells = tensor_of(cells).to(torch.int64)
        if cells.shape != (dummy.shape[0],):
            n = dummy.shape[0]
            raise ValueError(f"`CellMatrix` needs the effect of each of {n} rows, got shape {tuple(cells.shape)}.")
        if bool(((cells < 0) | (cells >= len(effects))).any()):
            raise ValueError(f"`CellMatrix` needs indices from 0 to {len(effects) - 1} for its effects.")
        super().__init__(dummy.codes.clone(), dummy.labels, None, effects)
        self.register_buffer("cells", cells, persistent=False)

    def _value(self, effect: int, like: Tensor) -> Tensor:
        return ((self.cells == effect) & (self.codes >= 0)).to(like.dtype)

    def _places(self, rows: Tensor | None = None) -> Tensor:
        """The column of Z that holds the 1 of each row, or of the given ones."""
        cells, codes = (self.cells, self.codes) if rows is None else (self.cells[rows], self.codes[rows])
        return cells * self.num_levels + (codes.clamp(min=0) if self._some_unknown else codes)

    def _known(self, like: Tensor) -> Tensor:
        return (self.codes >= 0).to(like.dtype)

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (self._places(rows) == columns) * (self.codes[rows] >= 0).to(params.dtype)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        part = rhs[self._places()]
        return part * self._known(rhs)[:, None] if self._some_unknown else part

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        part = rhs * self._known(rhs)[:, None] if self._some_unknown else rhs
        return part.new_zeros((self.shape[1], rhs.shape[1])).index_add(0, self._places(), part)

    def sandwich(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        part = inner.submatrix(inner_params, self._places(), self._places())
        if not self._some_unknown:
            return part
        known = self._known(part)
        return known[:, None] * part * known

    def sandwich_entries(
        self, params: Tensor, inner: Matrix, inner_params: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        part = inner.entries(inner_params, self._places(rows), self._places(columns))
        if not self._some_unknown:
            return part
        return ((self.codes[rows] >= 0) & (self.codes[columns] >= 0)) * part

    def add_sandwich_to(self, out: Tensor, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        """Where effects of different levels are uncorrelated, only pairs of rows of one level are touched."""
        blocks = inner.level_blocks(inner_params, self.num_levels)
        pairs = None if blocks is None else self._pairs_of_rows()
        if blocks is None or pairs is None:
            return out.add_(self.sandwich(params, inner, inner_params))
        i, j = pairs
        return out.index_put_((i, j), blocks[self.codes[i], self.cells[i], self.cells[j]], accumulate=True)
