"""Batches of whole clusters, so that no covariance between the rows of a cluster is lost."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from openreml_nn.solvers import processes


class ClusterBatchSampler(Sampler[list[int]]):
    r"""Yields batches of row indices that are made of whole clusters, for ``DataLoader(batch_sampler=...)``.

    The rows of one factor's levels stay together, so that for this factor the log-likelihoods of the batches add up to
    that of all rows. Each epoch has every row once and ``ceil(rows / batch_size)`` batches (rounded up to a multiple of
    ``num_replicas``), of nearly equal size: ``batch_size`` rows on average at most, and up to about one cluster more in
    a single one. A cluster of more than ``batch_size`` rows cannot stay whole: it is split into nearly equal parts,
    whose covariance with each other the batches then leave out.

    Args:
        codes: Cluster of each row, shape (n,); a row with the code −1 is a cluster of its own.
        batch_size: Rows of a batch.
        shuffle: Draw the clusters in a new order each epoch; in the order of their codes otherwise.
        seed: Seed of the order.
        num_replicas: Number of processes that share an epoch; those of ``torch.distributed`` at the time of the pass
            when left out, one where it is not in use. A Lightning `Trainer` of several processes wants
            ``use_distributed_sampler=False``, as it cannot divide batches of its own making.
        rank: Which of them this one is; it yields every ``num_replicas``-th batch. Given with ``num_replicas``.

    Attributes:
        torn: Number of clusters that are split.
        epoch: The epoch that the next pass has; it counts up by itself, and ``set_epoch`` sets it.

    Raises:
        ValueError: Codes of another kind, a rank without number of processes, or more processes than clusters.

    Warns:
        UserWarning: Clusters are split.

    Example:
        >>> from openreml_nn.nn import ClusterBatchSampler
        >>> list(ClusterBatchSampler([0, 1, 0, 2, 1, 2], batch_size=4, shuffle=False))
        [[0, 2], [1, 4, 3, 5]]
    """

    def __init__(
        self,
        codes: Any,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        array = np.asarray(codes.detach().cpu() if isinstance(codes, Tensor) else codes)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise ValueError(
                f"`ClusterBatchSampler` needs integer codes of shape (n,), got {array.dtype} of shape {array.shape}."
            )
        given = rank is not None and num_replicas is not None and 0 <= rank < num_replicas
        if batch_size < 1 or not (given or rank is num_replicas is None):
            raise ValueError(
                f"`ClusterBatchSampler` needs a batch_size of 1 or more and a rank below num_replicas, or neither of "
                f"the two, got batch_size {batch_size}, rank {rank} and num_replicas {num_replicas}."
            )
        self.batch_size, self.shuffle, self.seed = int(batch_size), shuffle, int(seed)
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0
        self.rows = np.argsort(array, kind="stable")
        ordered = array[self.rows]
        starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)]).nonzero()[0]
        sizes = np.diff(starts, append=len(array))
        pieces = -(-sizes // self.batch_size)
        self.torn = int((pieces > 1).sum())
        self.cluster = np.repeat(np.arange(len(sizes)), sizes)
        self.sizes = _evenly(sizes, pieces)
        self.starts = self.sizes.cumsum() - self.sizes
        self._count(self._place()[1])
        if self.torn:
            warnings.warn(
                f"{self.torn} of {len(sizes)} clusters have more than {self.batch_size} rows and are split; batches "
                f"leave out the covariance between their parts. A `batch_size` of {sizes.max()} keeps them whole.",
                stacklevel=2,
            )

    @property
    def sampler(self) -> "ClusterBatchSampler":
        """Itself: where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, by which the order is drawn."""
        self.epoch = epoch

    def _place(self) -> tuple[int, int]:
        """Which process this one is, and of how many."""
        if self.rank is not None and self.num_replicas is not None:
            return self.rank, self.num_replicas
        ranks = processes()
        return ranks.rank, ranks.size

    def _count(self, replicas: int) -> int:
        """Batches of all processes in an epoch."""
        wanted = math.ceil(len(self.rows) / (self.batch_size * replicas))
        count = min(wanted, len(self.sizes) // replicas) * replicas
        if not count:
            raise ValueError(f"{len(self.sizes)} clusters are too few for {replicas} processes.")
        return count

    def __len__(self) -> int:
        """Batches of this process, the same in every epoch."""
        replicas = self._place()[1]
        return self._count(replicas) // replicas

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches())

    def batches(self) -> Iterator[Tensor]:
        """The batches of an epoch as index tensors, for data that are tensors: ``x[index]`` needs no DataLoader."""
        rank, replicas = self._place()
        count, order, rows = self._count(replicas), np.arange(len(self.sizes)), self.rows
        if self.shuffle:
            generator = np.random.default_rng([self.seed, self.epoch])
            order = generator.permutation(len(self.sizes))
            if self.torn:  # other parts each time
                rows = rows[np.lexsort((generator.random(len(rows)), self.cluster))]
        self.epoch += 1
        sizes = self.sizes[order]
        ends = sizes.cumsum()
        slot = _slots(ends - 0.5 * sizes, int(ends[-1]), count)
        first = np.searchsorted(slot, np.arange(count + 1))
        for batch in range(rank, count, replicas):
            chosen = order[first[batch] : first[batch + 1]]
            yield torch.from_numpy(rows[_ranges(self.starts[chosen], self.sizes[chosen])])


def _slots(middles: np.ndarray, rows: int, count: int) -> np.ndarray:
    """Batch of each cluster: the equal share of the rows that its middle falls into, none left empty."""
    at = np.arange(len(middles))
    slot = np.minimum((middles * count / rows).astype(np.int64), count - 1)
    slot = np.minimum.accumulate(np.concatenate([[0], slot - at]))[1:] + at  # no batch is passed over
    return np.maximum(slot, at + count - len(middles))  # enough clusters are left for the last ones


def _evenly(sizes: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Sizes of the parts when each size is split into a number of nearly equal pieces."""
    if (pieces == 1).all():
        return sizes
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    size, piece = np.repeat(sizes, pieces), np.repeat(pieces, pieces)
    return size // piece + (number < size % piece)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The indices of several ranges, one after the other."""
    shift = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    return np.arange(len(shift)) + shift
