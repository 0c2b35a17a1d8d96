"""Which rows of V are correlated: its diagonal blocks, and which of them are the same matrix at every θ.

Rows are linked by the levels of random terms whose effects are correlated only within a level. Connected rows are a
block. Two elements of V are the same at every θ where their rows have the same covariates and cells and share the same
levels, and two blocks are where all their elements are: an element is computed once, and so is the factor of a block.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from openreml_nn.covariance import (
    CellMatrix,
    CovariancePropagation,
    DiagonalPropagation,
    DummyMatrix,
    KhatriRaoMatrix,
    Matrix,
)
from openreml_nn.covariance.structures import IdentityMatrix, IncidenceMatrix, ScalarMatrix
from openreml_nn.solvers.terms import operands_of


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one size: P patterns of m rows, each with up to r copies.

    Attributes:
        rows: The rows of each block, shape (P, m, r); n in place of a copy that is not there.
        copies: Number of blocks of each pattern, shape (P,).
    """

    rows: Tensor
    copies: Tensor

    @property
    def first(self) -> Tensor:
        """Rows of the first block of each pattern, shape (P, m)."""
        return self.rows[:, :, 0]


@dataclass(frozen=True)
class BlockPattern:
    """The diagonal blocks of V.

    Attributes:
        groups: Blocks by size and number of copies.
        order: Rows in the order of the groups, shape (N,), N ≥ n; n where there is no row.
        place: Place of each row in ``order``, shape (n,).
        elements: Row and column of each element of V that is computed, shape (2, D).
        element: Which of them each element of the first blocks of the groups is, shape (E,).
        designs: Name and design of each term that links rows.
    """

    groups: list[BlockGroup]
    order: Tensor
    place: Tensor
    elements: Tensor
    element: Tensor
    designs: list[tuple[str, IncidenceMatrix]]

    def spread(self, rhs: Tensor) -> Tensor:
        """Rows of ``rhs``, shape (n, k), in the order of the groups, shape (N, k), with rows of zeros where none is."""
        if len(self.order) == len(self.place):
            return rhs[self.order]
        return torch.cat([rhs, rhs.new_zeros(1, rhs.shape[1])])[self.order]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The part of each group of (N, k), shape (P, m, r·k)."""
        pieces = flat.split([group.rows.numel() for group in self.groups])
        return [piece.reshape(*group.first.shape, -1) for group, piece in zip(self.groups, pieces, strict=True)]

    def join(self, parts: list[Tensor], columns: int) -> Tensor:
        """What ``split`` takes apart, shape (N, columns)."""
        flat = [part.reshape(-1, columns) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def blocks(self, values: Tensor) -> list[Tensor]:
        """The first blocks of each group, shape (…, P, m, m), from the elements, shape (…, D)."""
        sizes = [group.first.numel() * group.first.shape[1] for group in self.groups]
        pieces = values[..., self.element].split(sizes, dim=-1)
        return [piece.reshape(*values.shape[:-1], *group.first.shape, -1)
                for group, piece in zip(self.groups, pieces, strict=True)]  # fmt: skip

    def to(self, device: torch.device) -> "BlockPattern":
        """The same on a device."""
        groups = [BlockGroup(group.rows.to(device), group.copies.to(device)) for group in self.groups]
        order, place, elements, element = (x.to(device) for x in (self.order, self.place, self.elements, self.element))
        return BlockPattern(groups, order, place, elements, element, self.designs)


def linking_designs(V: Matrix) -> list[tuple[str, IncidenceMatrix]] | str:
    """Name and design of each operand of V that correlates rows; what is wrong where one is not of the right kind."""
    designs = []
    with torch.no_grad():
        for name, operand, own in operands_of(V, V.theta.detach()):
            if operand.is_diagonal:
                continue
            what = f"its operand {name!r}" if name else "V"
            if not isinstance(operand, CovariancePropagation) or not isinstance(operand.Z, IncidenceMatrix):
                return (f"it needs operands that are diagonal or `CovariancePropagation(Z, G)` with level codes as Z, "
                        f"and {what} is a {type(operand).__name__}.")  # fmt: skip
            g = operand.split(own)[1]
            if not _is_exchangeable(operand.G, g, operand.Z.num_levels) and (
                operand.G.level_blocks(g, operand.Z.num_levels) is None
            ):
                return f"it needs effects that are correlated only within a level, and those of {what} are not."
            designs.append((name, operand.Z))
    return designs


def block_sizes(V: Matrix) -> np.ndarray:
    """Number of rows of each block, for a V that `linking_designs` takes."""
    designs = linking_designs(V)
    assert not isinstance(designs, str)
    return np.bincount(blocks_of_rows(V.shape[0], [_numpy(Z.codes) for _, Z in designs]))


def find_pattern(V: Matrix) -> BlockPattern:
    """The blocks of a V that `linking_designs` takes, found on the host; ``to`` brings them to the data."""
    n, designs = V.shape[0], linking_designs(V)
    assert not isinstance(designs, str)
    codes = [_numpy(Z.codes) for _, Z in designs]
    block, kind = blocks_of_rows(n, codes), _joint_code(_kinds_of_rows(V), n)
    order = np.lexsort((kind, *reversed(codes), block))
    sizes = np.bincount(block)
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)  # of the block of each sorted row
    local = [_local_levels(code[order], start) for code in codes]
    token = _joint_code([kind[order], *local], n)
    groups = [
        group
        for m in np.unique(sizes)
        for group in _groups_of_size(m, (np.cumsum(sizes) - sizes)[sizes == m], order, token)
    ]
    flat = torch.cat([group.rows.reshape(-1) for group in groups])
    place = torch.full((n + 1,), -1).index_put_((flat,), torch.arange(len(flat)))[:n]
    elements, element = _elements(groups, kind, codes)
    return BlockPattern(groups, flat, place, torch.from_numpy(elements), torch.from_numpy(element), designs)


def _groups_of_size(m: int, starts: np.ndarray, order: np.ndarray, token: np.ndarray) -> list[BlockGroup]:
    """Blocks of m rows by their numbers of copies: one group for each power of two, so that there are few."""
    rows = starts[:, None] + np.arange(m)
    pattern = _joint_code(list(token[rows].T), len(rows))
    copies = np.bincount(pattern)
    groups = []
    for power in np.unique(np.ceil(np.log2(copies))):
        patterns = np.flatnonzero(np.ceil(np.log2(copies)) == power)
        mine = np.flatnonzero(np.isin(pattern, patterns))
        mine = mine[np.argsort(pattern[mine], kind="stable")]
        own = copies[patterns]
        which = np.repeat(np.arange(len(patterns)), own)
        copy = np.arange(len(mine)) - np.repeat(np.cumsum(own) - own, own)
        table = np.full((len(patterns), m, own.max()), len(order))
        table[which, :, copy] = order[rows[mine]]
        groups.append(BlockGroup(torch.from_numpy(table), torch.from_numpy(own)))
    return groups


def _elements(groups: list[BlockGroup], kind: np.ndarray, codes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the elements to compute, shape (2, D), and which of them each element is, shape (E,)."""
    first = [group.first.numpy() for group in groups]
    count = kind.max() + 1
    if 2 * count**2 > sum(rows.size * rows.shape[1] for rows in first):  # few elements would repeat
        lower = [np.tril_indices(rows.shape[1]) for rows in first]
        pairs = [rows[:, part].transpose(1, 0, 2).reshape(2, -1) for rows, part in zip(first, lower, strict=True)]
        offsets = np.cumsum([0, *(pair.shape[1] for pair in pairs)])
        which = [offset + _triangle(rows) for rows, offset in zip(first, offsets, strict=False)]
        return np.concatenate(pairs, axis=1), np.concatenate(which)
    left = np.concatenate([np.repeat(rows, rows.shape[1], axis=1).ravel() for rows in first])
    right = np.concatenate([np.tile(rows, rows.shape[1]).ravel() for rows in first])
    joint = kind[left] * count + kind[right]
    for same in [left == right, *(code[left] == code[right] for code in codes)]:
        joint = 2 * joint + same
    element = pd.factorize(joint)[0]
    chosen = np.zeros(element.max() + 1, dtype=np.int64)
    chosen[element[::-1]] = np.arange(len(element))[::-1]
    return np.stack([left[chosen], right[chosen]]), element


def _triangle(rows: np.ndarray) -> np.ndarray:
    """Index into the lower triangles of P blocks of m rows, row by row, for each element of the blocks."""
    P, m = rows.shape
    i, j = np.indices((m, m))
    i, j = np.maximum(i, j), np.minimum(i, j)
    return (np.arange(P)[:, None] * (m * (m + 1) // 2) + (i * (i + 1) // 2 + j).ravel()).ravel()


def blocks_of_rows(n: int, codes: list[np.ndarray]) -> np.ndarray:
    """Block of each row, from 0: the connected components of rows and levels."""
    if not codes:
        return np.arange(n)
    offsets = n + np.cumsum([0, *(code.max() + 1 for code in codes)])
    rows = np.concatenate([np.flatnonzero(code >= 0) for code in codes])
    levels = np.concatenate([code[code >= 0] + first for code, first in zip(codes, offsets, strict=False)])
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, levels)), shape=(offsets[-1], offsets[-1]))
    return pd.factorize(connected_components(graph, directed=False)[1][:n])[0]


def _kinds_of_rows(V: Matrix) -> list[np.ndarray]:
    """Numbers on which the elements of V of a row depend, beyond which levels it shares; the row itself if unknown."""
    kinds: list[np.ndarray] = []
    row = np.arange(V.shape[0])
    for _, operand, own in operands_of(V, V.theta.detach()):
        if isinstance(operand, CovariancePropagation) and isinstance(operand.Z, IncidenceMatrix):
            Z, g = operand.Z, operand.split(own)[1]
            if type(Z) not in (DummyMatrix, KhatriRaoMatrix, CellMatrix):
                kinds.append(row)
            codes = _numpy(Z.codes)
            kinds.append(codes < 0 if _is_exchangeable(operand.G, g, Z.num_levels) else codes)
            if isinstance(Z, CellMatrix):
                kinds.append(_numpy(Z.cells))
            elif Z.values is not None:
                kinds += list(_numpy(Z.values).T)
        elif isinstance(operand, DiagonalPropagation):
            kinds += list(_numpy(operand.X).T)
        elif not isinstance(operand, IdentityMatrix | ScalarMatrix):
            kinds.append(row)
    return kinds


def _is_exchangeable(G: Matrix, params: Tensor, count: int) -> bool:
    """Whether all levels have one covariance, at every θ."""
    return G.common_block(params, count) is not None


def _joint_code(columns: list[np.ndarray], n: int) -> np.ndarray:
    """One integer for each of n rows, equal where all columns are."""
    joint = np.zeros(n, dtype=np.int64)
    for column in columns:
        own = pd.factorize(column)[0]
        joint = pd.factorize(joint * (own.max() + 1) + own)[0]
    return joint


def _local_levels(codes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Levels within a block, as the place of their first row in it; −1 for a row of no level. Rows are sorted."""
    first = np.zeros(codes.max() + 2, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return np.where(codes >= 0, first[codes] - start, -1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
