"""Batches of a network: all rows once, many as one, and which are the same."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from openreml_nn.lightning.network_batches import joined, leaves, parts_of, same_levels, whole
from openreml_nn.nn import ClusterBatchSampler

X, Y, CODES = torch.randn(30, 2), torch.randn(30), torch.arange(30) % 7


def test_every_row_once():
    data = TensorDataset(X, Y, CODES)
    by_clusters = DataLoader(data, batch_sampler=ClusterBatchSampler(CODES, 7))
    for given in (by_clusters, DataLoader(data, batch_size=7, shuffle=True, drop_last=True)):
        assert torch.equal(torch.cat([y for _, y, _ in whole(given, 8)]), Y)
    batches = [(X, Y, CODES)]
    assert whole(batches, 8) is batches
    assert len(list(whole(DataLoader(batches, batch_size=None), 8))) == 1

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(X, Y, CODES, strict=True)

    stream = DataLoader(Stream(), batch_size=5)
    assert whole(stream, 8) is stream


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
