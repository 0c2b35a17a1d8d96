"""Which layout costs least for elements in given places: dense, a band, a chain of blocks, or one with a border."""

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.borders import BorderedLayout
from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.layouts import DenseLayout, Layout

NARROWEST = 32  # width of a block below which the calls cost more than the arithmetic; half as much in a band
CALL = 100_000  # multiplications in the time of a call
WIDEST = 128  # reach up to which a band on the CPU is quicker than a chain
SPARSE_SHARE = 0.25  # elements of the lower triangle, as a share of q², above which no order is looked for
MANY = 0.05  # the same with repetitions, above which they are counted once each


def choose_layout(row: Tensor, column: Tensor, size: int) -> Layout:
    """The layout in which a factor and an inverse cost least; an order is found on the host, by SciPy.

    Effects that meet more others than most do are tried in the border, those that meet the most first.

    Args:
        row: Rows of the elements of the lower triangle that may be other than zero; they may repeat.
        column: Their columns.
        size: q.
    """
    dense = DenseLayout(size)
    if size**3 < 15 * CALL:
        return dense
    if len(row) > MANY * size * size:
        row, column = distinct(row, column, size)
        if len(row) > SPARSE_SHARE * size * size:
            return dense
    i, j = row.cpu().numpy(), column.cpu().numpy()
    both = np.concatenate([i, j]), np.concatenate([j, i])
    graph = csr_array((np.ones(len(both[0]), dtype=bool), both), shape=(size, size))
    layouts: list[Layout] = [dense, _chain(graph, np.ones(size, dtype=bool), row.device)]
    degrees = np.diff(graph.indptr)
    bound = int(degrees.max()) // 2
    while bound > np.median(degrees) and layouts[-1].work > 18 * NARROWEST**2 * size:
        layouts.append(_chain(graph, degrees <= bound, row.device))
        bound //= 2
    return min(layouts, key=_time)


def distinct(row: Tensor, column: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each element once: by a mark at its place among q², or by sorting where these are many more."""
    places = row.to(torch.int64) * size + column
    if len(places) > MANY * size * size:
        marks = torch.zeros(size * size, dtype=torch.bool, device=row.device).index_fill_(0, places, True)
        places = marks.nonzero()[:, 0]
    else:
        places = places.unique()
    return places // size, places % size


def _time(layout: Layout) -> float:
    """In units of a multiplication."""
    return layout.work + layout.calls * CALL


def _chain(graph: csr_array, inside: np.ndarray, device: torch.device) -> Layout:
    """A band or a chain of the rows inside, in an order that brings their elements near the diagonal; others a border.

    A GPU takes chains, of which it does many operations at once.
    """
    kept = np.flatnonzero(inside)
    part = graph if len(kept) == len(inside) else graph[kept][:, kept].tocsr()
    order = reverse_cuthill_mckee(part, symmetric_mode=True).astype(np.int64)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    reach = int(np.abs(position[part.indices] - np.repeat(position, np.diff(part.indptr))).max(initial=0))
    places = torch.from_numpy(order).to(device)
    if len(kept) == len(inside) and reach <= WIDEST and device.type == "cpu":
        return BandLayout(places, max(NARROWEST // 2, reach))
    chain = ChainLayout(places, max(NARROWEST, reach))
    if len(kept) == len(inside):
        return chain
    return BorderedLayout(chain, torch.from_numpy(np.flatnonzero(~inside)).to(device), len(inside))
