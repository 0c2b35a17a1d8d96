"""Batches of a network: all rows once, many as one, and which are the same."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from openreml_nn.lightning import network_batches
from openreml_nn.lightning.network_batches import joined, leaves, parts_of, rows_once, same_levels
from openreml_nn.nn import ClusterBatchSampler

X, Y, CODES = torch.randn(30, 2), torch.randn(30), torch.arange(30) % 7


def test_every_row_once():
    data = TensorDataset(X, Y, CODES)
    by_clusters = DataLoader(data, batch_sampler=ClusterBatchSampler(CODES, 7))
    for given in (by_clusters, DataLoader(data, batch_size=7, shuffle=True, drop_last=True)):
        assert torch.equal(torch.cat([y for _, y, _ in rows_once(given, 8)]), Y)
    batches = [(X, Y, CODES)]
    assert rows_once(batches, 8) is batches
    assert len(list(rows_once(DataLoader(batches, batch_size=None), 8))) == 1

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(X, Y, CODES, strict=True)

    stream = DataLoader(Stream(), batch_size=5)
    assert rows_once(stream, 8) is stream


class Own:
    """A sampler, or a batch sampler, that torch does not know."""

    def __init__(self, entries):
        self.entries, self.epoch = entries, 0

    def __iter__(self):
        self.epoch += 1
        torch.rand(1)
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


CHOSEN = torch.tensor([4, 9, 2, 28, 17])
PART = [0.0, 1.0] * 15


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SubsetRandomSampler(CHOSEN), CHOSEN.sort()[0]),
        (SubsetRandomSampler(CHOSEN.tolist() * 2), CHOSEN.sort()[0]),
        (WeightedRandomSampler(PART, 100), torch.arange(1, 30, 2)),
        (RandomSampler(range(30), num_samples=3), torch.arange(30)),
        (RandomSampler(range(30), replacement=True), torch.arange(30)),
        (SequentialSampler(range(12)), torch.arange(12)),
        (DistributedSampler(range(30), 2, 0), torch.arange(30)),
        (DistributedSamplerWrapper(SubsetRandomSampler(CHOSEN), 2, 0), CHOSEN.sort()[0]),
        (Own(CHOSEN.tolist()), CHOSEN.sort()[0]),
        (Own(list(range(30)) * 3), torch.arange(30)),
    ],
)
def test_rows_that_a_sampler_does_not_draw_are_left_out(sampler, expected):
    data = TensorDataset(X, Y, CODES)
    for batches in (
        DataLoader(data, sampler=sampler, batch_size=4),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=True)),
        DataLoader(data, sampler=sampler, batch_size=None),
    ):
        before = torch.get_rng_state()
        parts = rows_once(batches, 8)
        assert torch.equal(torch.get_rng_state(), before)
        found = [y.reshape(-1) for _, y, _ in parts]
        assert torch.equal(torch.cat(found), Y[expected])
        assert len(found[0]) == (min(8, len(expected)) if batches.batch_sampler is not None else 1)


def test_batch_samplers_of_users(monkeypatch):
    data, pairs = TensorDataset(X, Y, CODES), Own([[4, 9], torch.tensor([2, 28])])
    loader = DataLoader(data, batch_sampler=pairs)
    assert torch.equal(next(iter(rows_once(loader, 8)))[1], Y[[2, 4, 9, 28]])
    assert pairs.epoch == 0
    monkeypatch.setattr(network_batches, "processes", lambda: SimpleNamespace(size=2))
    with pytest.raises(ValueError, match=r"Own, has 4 of 30 rows on this process.* `torch.utils.data.Subset`"):
        rows_once(loader, 8)


class Blocks(Dataset):
    """Gives a batch for a list of rows."""

    def __len__(self):
        return 30

    def __getitem__(self, rows):
        return X[rows], Y[rows], CODES[rows]


@pytest.mark.parametrize("sampler", [ClusterBatchSampler(CODES, 7), Own([list(range(20)), list(range(20, 30))])])
def test_data_sets_that_give_batches_for_lists(sampler):
    parts = list(rows_once(DataLoader(Blocks(), sampler=sampler, batch_size=None), 8))
    assert [len(y) for _, y, _ in parts] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([y for _, y, _ in parts]), Y)


def test_options_of_a_loader_are_kept():
    def begin(worker):
        pass

    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y, CODES), worker_init_fn=begin, generator=generator)
    state, same = generator.get_state(), rows_once(loader, 8)
    assert same.worker_init_fn is begin
    assert len(list(same)) == 4
    assert same.generator is not generator
    assert torch.equal(generator.get_state(), state)


def test_joined():
    batches = [(X[:9], {"a": (CODES[:9], X[:9])}), (X[9:], {"a": (CODES[9:], X[9:])})]
    x, groups = joined(batches)
    assert torch.equal(x, X)
    assert torch.equal(groups["a"][0], CODES)
    with pytest.raises(TypeError, match="Batches hold tensors, got str"):
        joined([["a"], ["b"]])


def test_same_levels():
    groups = {"a": (CODES, X)}
    assert same_levels(groups, groups)
    assert same_levels(groups, {"a": [CODES.clone(), X.clone()]})
    assert not same_levels(groups, {"a": (CODES + 1, X)})
    assert not same_levels(groups, {"a": CODES})
    assert not same_levels(CODES, "site")
    assert [part is own for part, own in zip(leaves((groups, Y)), (CODES, X, Y), strict=True)] == [True] * 3


def test_parts():
    assert parts_of([X, Y, CODES]) == (X, Y, CODES)
    with pytest.raises(ValueError, match=r"Batches are \(x, y, groups\), got Tensor"):
        parts_of(X)
