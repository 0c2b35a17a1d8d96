"""Batches ``(x, y, groups)`` of a network: their parts, all rows of a loader, and many batches as one."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


def whole(loader: Iterable, rows: int) -> Iterable:
    """Batches with each row of a loader's data set once, in the order of the data set.

    Args:
        loader: A DataLoader; anything else, and one over an `IterableDataset`, is given back as it is.
        rows: Rows of a batch.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = None if loader.batch_size is None and loader.batch_sampler is None else rows
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


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
