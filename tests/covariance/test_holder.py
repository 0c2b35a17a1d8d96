"""`Holder`: names of any text, and one thing under two names."""

import pytest
import torch
from torch import nn

from openreml_nn.covariance.holder import Holder, registered_name


def test_names_are_one_to_one_and_accepted() -> None:
    names = ["grad", "grad_", "to", "a.b", "a%2Eb", "a_b", "training", "__getitem__", "σ²", "x y/z"]
    assert len({registered_name(name) for name in names}) == len(names)
    holder = Holder()
    for i, name in enumerate(names):
        holder[name] = nn.Parameter(torch.tensor([float(i)]))
    assert [holder[name].item() for name in names] == list(range(len(names)))
    assert [p.item() for p in holder] == list(range(len(names)))
    with pytest.raises(KeyError):
        holder["b"]


def test_a_module_with_two_names_is_there_twice() -> None:
    holder, layer = Holder(), nn.Linear(1, 1)
    holder["first"], holder["second"] = layer, layer
    assert list(holder) == [layer, layer]
    assert len(list(holder.parameters())) == 2
