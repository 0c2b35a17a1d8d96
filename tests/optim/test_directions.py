"""Directions: each is the information matrix of its name."""

import pytest
import torch

from openreml_nn import ML, REML
from openreml_nn.covariance import AR1Matrix
from openreml_nn.likelihood import average_information, fisher_information, full_loglik, observed_information
from openreml_nn.optim import Average, Fisher, Observed


@pytest.mark.parametrize("recording", [True, False])
def test_each_gives_its_matrix(recording: bool) -> None:
    objective = ML(AR1Matrix(8), "dense")
    evaluation = objective.prepare(torch.randn(8, dtype=torch.float64)).evaluate()
    with torch.set_grad_enabled(recording):
        torch.testing.assert_close(Average().information(objective, evaluation), average_information(evaluation))
        torch.testing.assert_close(Fisher().information(objective, evaluation), fisher_information(evaluation))
        got = Observed().information(objective, evaluation)
    torch.testing.assert_close(got, observed_information(evaluation, full_loglik))
    assert not got.requires_grad


def test_observed_is_of_the_objectives_own_likelihood() -> None:
    y = torch.randn(8, dtype=torch.float64)
    matrices = []
    for method in (REML, ML):
        objective = method(AR1Matrix(8), "dense")
        matrices.append(Observed().information(objective, objective.prepare(y).evaluate()))
    assert not torch.allclose(*matrices)
