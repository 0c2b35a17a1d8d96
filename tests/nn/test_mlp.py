"""MLP: its layers, and what it refuses."""

import pytest
import torch
from torch import nn

from openreml_nn.nn import MLP


def test_layers():
    kinds = [type(layer) for layer in MLP(3, [8, 4], dropout=0.2)]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert MLP(3, [8, 4], outputs=None)(torch.randn(5, 3)).shape == (5, 4)
    assert MLP(3, [], outputs=2)(torch.randn(5, 3)).shape == (5, 2)


def test_refused():
    with pytest.raises(ValueError, match="made for 3 inputs, got 4"):
        MLP(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"sizes of 1 or more, got \[3, 0\]"):
        MLP(3, [0])
