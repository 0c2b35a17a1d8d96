"""Batches ``(x, y, groups)`` of a network: their parts, all rows of a loader, and many batches as one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from numbers import Integral
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from openreml_nn.nn import ClusterBatchSampler
from openreml_nn.solvers import processes


def rows_once(loader: Iterable, rows: int) -> Iterable:
    """Batches with each training row of a loader once, in the order of its data set.

    Training rows are those that the sampler can draw: the indices of a ``SubsetRandomSampler``, the rows with a weight
    of a ``WeightedRandomSampler``, the rows of one pass of a sampler that is not known here; otherwise all.

    Args:
        loader: A DataLoader; anything else, and one over an `IterableDataset`, is given back as it is.
        rows: Rows of a batch.

    Raises:
        ValueError: Several processes, and a pass of a sampler that is not known here has not all rows: whether others
            have the rest cannot be told.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    collated = loader.batch_sampler is not None  # else the data set gives batches: one for an index, or for a list
    index, by_lists = _training_rows(loader.batch_sampler if collated else loader.sampler, len(loader.dataset))  # type: ignore[arg-type]
    return DataLoader(
        loader.dataset,
        batch_size=rows if collated else None,
        sampler=BatchSampler(index, rows, drop_last=False) if by_lists and not collated else index,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=None if loader.generator is None else loader.generator.clone_state(),  # its own goes on as it was
    )


def _training_rows(sampler: Iterable, count: int) -> tuple[Sequence[int], bool]:
    """Rows that a sampler can draw of so many, in their order, and whether it yields lists of them."""
    if isinstance(sampler, ClusterBatchSampler):
        return range(len(sampler.rows)), True
    if type(sampler) is BatchSampler:
        return _training_rows(sampler.sampler, count)[0], True
    if isinstance(sampler, (SequentialSampler, RandomSampler)):
        return range(len(sampler.data_source)), False
    if isinstance(sampler, SubsetRandomSampler):
        return sorted({int(i) for i in sampler.indices}), False
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero()[:, 0].tolist(), False
    if isinstance(sampler, DistributedSamplerWrapper):
        return _training_rows(sampler.dataset._sampler, count)  # type: ignore[attr-defined]
    if isinstance(sampler, DistributedSampler):
        return range(len(sampler.dataset)), False  # type: ignore[arg-type]
    return _rows_of_a_pass(sampler, count)


def _rows_of_a_pass(sampler: Iterable, count: int) -> tuple[Sequence[int], bool]:
    """As `_training_rows`, of a sampler of any kind, which is passed through with the random numbers kept."""
    found: set[int] = set()
    by_lists = False
    with torch.random.fork_rng(devices=[]):
        for entry in copy(sampler):
            by_lists = not isinstance(entry, Integral) and not (isinstance(entry, Tensor) and not entry.ndim)
            found.update(int(i) for i in (entry if by_lists else [entry]))
            if len(found) == count:
                break
    if len(found) < count and processes().size > 1:
        raise ValueError(
            f"A pass of the sampler, {type(sampler).__name__}, has {len(found)} of {count} rows on this process. Which "
            f"rows are for training cannot be told: give their `torch.utils.data.Subset`, and batches by "
            f"`ClusterBatchSampler` or a `DistributedSampler`."
        )
    return sorted(found), by_lists


def joined(parts: list[Any]) -> Any:
    """Tensors, or dictionaries and tuples of them, one after the other; a TypeError for anything else."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if not isinstance(first, (tuple, list)):
        raise TypeError(f"Batches hold tensors, got {type(first).__name__}. Of labels make codes by `Effects.encode`.")
    return tuple(joined(list(own)) for own in zip(*parts, strict=True))


def parts_of(batch: Any) -> tuple[Any, Tensor, Any]:
    """x, y and groups of a batch; a ValueError unless it has these three."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 3:
        raise ValueError(
            f"Batches are (x, y, groups), got {form_of(batch)}. Levels of several factors are one dictionary of codes."
        )
    return batch[0], batch[1], batch[2]


def form_of(batch: Any) -> str:
    """What a batch is, in words for an error."""
    return f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__


def same_levels(a: Any, b: Any) -> bool:
    """Whether two batches have the same levels."""
    one, two = list(leaves(a)), list(leaves(b))
    return len(one) == len(two) and all(x is y or _equal(x, y) for x, y in zip(one, two, strict=True))


def leaves(batch: Any) -> Iterator[Any]:
    """What dictionaries and sequences of a batch hold."""
    if isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from leaves(part)
    else:
        yield batch


def _equal(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y)
