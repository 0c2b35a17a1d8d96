"""Thetas stay in float64 in a network of any precision."""

import pytest
import torch
from torch import nn

from openreml_nn.covariance import KnownMatrix, UnstructuredMatrix
from openreml_nn.nn import Effects, MixedModelHead, RandomEffect

CASTS = [nn.Module.float, nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.float32)]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("covariance", [None, KnownMatrix(torch.eye(3) + 0.5), UnstructuredMatrix(3)])
def test_thetas_and_divergence_stay(cast, covariance):
    layer = RandomEffect(Effects(3, covariance=covariance))
    before = layer.kl().item()
    network = cast(nn.ModuleDict({"f": nn.Linear(2, 1), "layer": layer, "head": MixedModelHead({"a": Effects(2)})}))
    assert network["f"].weight.dtype == layer.posterior.mean.dtype != torch.float64
    assert all(p.dtype == torch.float64 for part in (layer.effects, network["head"]) for p in part.parameters())
    assert layer.kl().dtype == torch.float64
    assert layer.kl().item() == pytest.approx(before, abs=0.05)


def test_buffers_of_the_precision_stay():
    layer = RandomEffect(Effects(3, covariance=KnownMatrix(torch.eye(3) + 0.5))).half()
    assert {b.dtype for b in layer.prior.buffers()} == {torch.float64}
