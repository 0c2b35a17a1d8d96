"""A prepared batch: V at the thetas of the module, evaluations that are kept, and the result."""

import pytest
import torch

from openreml_nn import REML
from openreml_nn.data import MixedModel
from openreml_nn.lightning import Batch
from openreml_nn.lightning.prepared import PreparedBatch, covariance_of
from openreml_nn.solvers import ALONE


@pytest.fixture
def model():
    return MixedModel("sleepstudy", "Reaction ~ Days", ["Subject"])


def test_keeps_the_last_evaluation(model):
    prepared = PreparedBatch(Batch(model.y, model.X), REML(model.V), "drop", ALONE)
    theta = model.V.theta.detach()
    first = prepared.at(theta)
    assert prepared.at(theta.clone()) is first
    assert prepared.at(theta + 1.0) is prepared.evaluation
    assert prepared.evaluation is not first
    result = prepared.result([], 1.5)
    assert torch.equal(result.theta, theta)
    assert (result.seconds, result.x_names, result.reason) == (1.5, ["x0", "x1"], "no step was made")


def test_other_data_than_those_of_a_checkpoint(model):
    objective, batch = REML(model.V), Batch(model.y, model.X)
    before = PreparedBatch(batch, objective, "drop", ALONE).fingerprint
    PreparedBatch(batch, objective, "drop", ALONE, before)
    with pytest.raises(ValueError, match="of a fit to other data: the response differs"):
        PreparedBatch(Batch(model.y + 1.0, model.X), objective, "drop", ALONE, before)


def test_covariance_of_a_batch_follows_that_of_the_module(model):
    part, _ = model.part(torch.arange(90).numpy())
    model.V.set_theta(torch.tensor([0.5, 0.25]))
    model.V.set_no_grad([1])
    V = covariance_of(Batch(part.y, part.X, V=part.V), model.V)
    assert V is part.V
    assert V.theta.tolist() == [0.5, 0.25]
    assert V.no_grad_index == [1]
    assert covariance_of(Batch(part.y), model.V) is model.V
    other = MixedModel("sleepstudy", "Reaction ~ 1", residual=None).V
    with pytest.raises(ValueError, match=r"The batch has a V with the parameters .* Make both from one model"):
        covariance_of(Batch(part.y, V=other), model.V)
