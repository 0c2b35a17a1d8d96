"""Batches of whole clusters: every row once, nothing torn but what is too large, processes in step."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead


def clusters(rows: int, levels: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, levels, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "levels", "size"), [(1000, 100, 50), (1000, 7, 200), (97, 97, 10), (30, 3, 30)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_whole_clusters_in_even_batches(rows, levels, size, shuffle):
    codes = clusters(rows, levels)
    sampler = ClusterBatchSampler(codes, size, shuffle)
    largest = int(torch.bincount(codes).max())
    for _ in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler) == -(-rows // size)
        assert sorted(itertools.chain(*batches)) == list(range(rows))
        homes = [set(codes[batch].tolist()) for batch in batches]
        assert sum(map(len, homes)) == len(set(codes.tolist()))
        assert all(0 < len(batch) <= size + largest for batch in batches)


def test_order_changes_by_epoch_and_by_seed_alone():
    codes = clusters(200, 40)
    first, second = ClusterBatchSampler(codes, 20), ClusterBatchSampler(codes, 20)
    epochs = [list(first) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [list(second) for _ in range(3)]
    second.set_epoch(1)
    assert list(second) == epochs[1]
    assert list(ClusterBatchSampler(codes, 20, seed=1)) != epochs[0]
    assert len({tuple(map(tuple, ClusterBatchSampler(codes, 20, shuffle=False))) for _ in range(2)}) == 1


def test_large_clusters_are_split_counted_and_said():
    codes = torch.tensor([0] * 25 + [1] * 3 + [2] * 10 + [3] * 11)
    with pytest.warns(UserWarning, match=r"2 of 4 clusters have more than 10 rows and are split.*`batch_size` of 25"):
        sampler = ClusterBatchSampler(codes, 10)
    assert sampler.torn == 2
    epochs = [list(sampler) for _ in range(4)]
    for batches in epochs:
        assert sorted(itertools.chain(*batches)) == list(range(len(codes)))
        assert max(map(len, batches)) <= 20
    parts = {frozenset(i for i in batch if i < 25) for batches in epochs for batch in batches}
    assert len(parts) > 6  # other rows together each time


def test_nothing_is_said_of_clusters_that_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ClusterBatchSampler([0] * 10 + [1] * 4, 10).torn == 0


def test_rows_of_unknown_clusters_are_alone():
    sampler = ClusterBatchSampler([-1, -1, -1, 0, 0], 2, shuffle=False)
    assert list(sampler) == [[0, 1], [2], [3, 4]]
    assert sampler.torn == 0


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_share_an_epoch(replicas):
    codes = clusters(300, 50)
    ranks = [ClusterBatchSampler(codes, 32, num_replicas=replicas, rank=r) for r in range(replicas)]
    for _ in range(2):
        shares = [list(rank) for rank in ranks]
        assert len({len(share) for share in shares}) == 1 == len({len(rank) for rank in ranks})
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(300))


def test_processes_are_those_of_torch_when_left_out(monkeypatch):
    codes = clusters(300, 50)
    sampler = ClusterBatchSampler(codes, 32)  # made before there are processes
    assert len(sampler) == 10
    for rank in (0, 1, 2):
        share = list(ClusterBatchSampler(codes, 32, num_replicas=3, rank=rank))
        monkeypatch.setattr("openreml_nn.nn.sampler.processes", lambda own=rank: SimpleNamespace(rank=own, size=3))
        sampler.set_epoch(0)
        assert list(sampler) == share
        assert len(sampler) == len(share)


def test_no_batch_is_empty_where_clusters_are_as_large_as_batches():
    for sizes in ([280, 280, 280, 160], [10, 10, 10, 1], [1, 10, 10, 10], [10, 1, 10, 1, 10]):
        codes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        sampler = ClusterBatchSampler(codes, max(sizes), shuffle=False)
        assert all(sampler)
        assert sampler.torn == 0


def test_feeds_a_loader():
    codes = clusters(60, 12)
    data = TensorDataset(torch.arange(60), codes)
    loader = DataLoader(data, batch_sampler=ClusterBatchSampler(codes, 12))
    seen = [set(own.tolist()) for _, own in loader]
    assert sum(map(len, seen)) == len(set(codes.tolist()))
    again = ClusterBatchSampler(codes, 12)
    assert [batch.tolist() for batch in again.batches()] == list(ClusterBatchSampler(codes, 12))
    assert again.epoch == 1
    assert loader.batch_sampler.sampler is loader.batch_sampler  # where Lightning sets the epoch


def test_batches_add_up_to_the_exact_likelihood():
    codes = clusters(80, 15)
    head, y = MixedModelHead({"a": Effects(15)}), torch.randn(80)
    f = torch.zeros(80)
    whole = 80 * head(f, y, codes)
    parts = sum(len(b) * head(f[b], y[b], codes[b]) for b in ClusterBatchSampler(codes, 10))
    assert parts.item() == pytest.approx(whole.item(), abs=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codes": [0.5], "batch_size": 1}, "integer codes"), ({"codes": [], "batch_size": 1}, "integer codes"),
     ({"codes": [0], "batch_size": 0}, "batch_size of 1 or more"),
     ({"codes": [0], "batch_size": 1, "num_replicas": 2, "rank": 2}, "rank below"),
     ({"codes": [0], "batch_size": 1, "num_replicas": 2}, "or neither of"),
     ({"codes": [0], "batch_size": 1, "rank": 0}, "or neither of"),
     ({"codes": [0], "batch_size": 1, "num_replicas": 2, "rank": 1}, "too few")],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ClusterBatchSampler(**options)
