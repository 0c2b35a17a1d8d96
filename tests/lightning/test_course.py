"""The course of a fit: what it says before the first step, after one, and where a step that is cut off leads back."""

import numpy as np
import torch

from openreml_nn import fit
from openreml_nn.data import MixedModel
from openreml_nn.fit import ALL_FIXED
from openreml_nn.lightning.course import Course
from openreml_nn.likelihood import average_information


def test_follows_a_fit():
    model = MixedModel("sleepstudy", "Reaction ~ Days", ["Subject"])
    result = fit(model.V, model.y, model.X)
    course = Course(model.V, result.history[:-1], 2.0)
    assert (course.seconds, course.ended, course.converged) == (2.0, "", False)
    assert np.isnan(course.natural_scale()[1]).all()
    course.stand(model.V.theta, average_information(result.evaluation).numpy())
    course.history.append(result.history[-1])
    assert (course.ended, course.converged) == (result.reason, True)
    estimates, errors = course.natural_scale()
    np.testing.assert_allclose(estimates, result.variance["estimate"])
    np.testing.assert_allclose(errors, result.variance["std_error"], rtol=1e-6)
    model.V.set_theta(torch.zeros(2))
    course.take_back()
    assert torch.equal(model.V.theta, result.theta)


def test_nothing_is_free():
    V = MixedModel("sleepstudy", "Reaction ~ Days", ["Subject"]).V
    V.requires_grad_(False)
    course = Course(V)
    assert (course.progress, course.ended, course.converged) == (None, ALL_FIXED, True)
    assert course.natural_scale()[0].tolist() == [1.0, 1.0]
