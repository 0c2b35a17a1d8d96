"""A network by pieces of rows: the same output and gradients, fewer activations."""

import pytest
import torch
from torch import nn

from openreml_nn.nn import in_chunks


@pytest.mark.parametrize("rows", [1, 4, 11, 50])
def test_same_output_and_gradients(rows):
    network, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(11, 3, requires_grad=True)
    inputs = [x, *network.parameters()]
    weights = torch.randn(11, 2)
    whole, pieces = network(x), in_chunks(network, x, rows)
    torch.testing.assert_close(pieces, whole)
    expected = torch.autograd.grad((whole * weights).sum(), inputs)
    for own, wanted in zip(torch.autograd.grad((pieces * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(own, wanted)
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(network, x, rows), whole)


def test_several_inputs_and_dropout():
    torch.manual_seed(1)
    drop = nn.Dropout(0.5)
    a, b = torch.ones(40, requires_grad=True), torch.arange(40.0)
    output = in_chunks(lambda a, b: drop(a) * b, (a, b), 7)
    output.sum().backward()
    torch.testing.assert_close(a.grad, output.detach())  # the mask of the backward pass is that of the forward pass


def test_activations_are_not_kept():
    kept = []
    network = nn.Sequential(nn.Linear(3, 1000), nn.ReLU(), nn.Linear(1000, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        in_chunks(network, torch.randn(64, 3), 16)
    assert sum(kept) < 64 * 100


def test_refusals():
    with pytest.raises(ValueError, match="at least 1 row"):
        in_chunks(nn.Linear(1, 1), torch.ones(2, 1), 0)
    with pytest.raises(ValueError, match="one length"):
        in_chunks(torch.add, (torch.ones(2), torch.ones(3)), 1)
