"""Progress of an optimizer that does not tell it: by the formulas, at the point that it evaluated last."""

import math

import numpy as np
import pytest
import torch

from openreml_nn import REML
from openreml_nn.data import MixedModel
from openreml_nn.lightning.measure import measured_progress
from openreml_nn.likelihood import average_information


def test_progress_at_the_point_that_was_evaluated():
    model = MixedModel("sleepstudy", "Reaction ~ Days", ["Subject"])
    model.V.set_theta(torch.tensor([3.0, 3.0]))
    objective = REML(model.V)
    problem = objective.prepare(model.y, model.X)
    theta = model.V.theta.detach()
    evaluation = problem.evaluate()
    (-objective.loglik(evaluation)).backward()
    score, H = -torch.cat([p.grad for p in model.V.theta_parameters()]), average_information(evaluation)
    model.V.set_theta(theta + 1.0)  # as an optimizer has moved on
    progress, information = measured_progress(objective, evaluation, H, theta - 0.5, 1e-8, 7, 3)
    np.testing.assert_allclose(information, H)
    assert (progress.iteration, progress.trials, progress.done, progress.reason) == (7, 3, False, "")
    assert progress.loglik == pytest.approx(objective.loglik(evaluation).item())
    assert progress.score_norm == pytest.approx(float(score.norm()))
    assert progress.decrement == pytest.approx(float(score @ torch.linalg.solve(H, score)))
    assert progress.step_norm == pytest.approx(1.5 * math.sqrt(2.0))
    done, _ = measured_progress(objective, evaluation, H, theta - 0.5, math.inf, 7, 3)
    assert (done.done, done.converged, done.reason) == (True, True, "the score is zero")
    assert done.step_norm == pytest.approx(0.5 * math.sqrt(2.0))
