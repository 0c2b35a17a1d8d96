"""Figures: what they hold, without looking at pixels."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import figures, fit
from openreml_nn.data import Kernel, MixedModel, Term


@pytest.fixture(scope="module")
def sleep():
    model = MixedModel("sleepstudy", "Reaction ~ Days", {"Subject": Term(groups="Subject", design="1 + Days")})
    return fit(model.V, model.y, model.X)


def test_covariance_of_the_effects_of_one_level(sleep):
    (shown,) = figures.term_covariances(sleep)
    assert (shown.name, shown.labels) == ("Subject", ["Intercept", "Days"])
    variance = sleep.variance["estimate"]
    assert shown.values[np.tril_indices(2)] == pytest.approx(variance[:3].to_numpy())
    C = figures.correlation(shown.values)
    assert np.diag(C) == pytest.approx(1.0)
    assert C[0, 1] == pytest.approx(variance[1] / np.sqrt(variance[0] * variance[2]))


def test_large_covariances_are_cut():
    model = MixedModel("gblup150", "y ~ trial", {"line": Term("line", relationship=Kernel("gblup150_K"))})
    (shown,) = figures.term_covariances(fit(model.V, model.y, model.X), most=50)
    assert shown.values.shape == (50, 50)
    assert shown.labels[:2] == ["L001", "L002"]
    assert shown.note == "first 50 of 150 rows"


def test_correlation_beside_a_zero_variance():
    assert figures.correlation(np.array([[0.0, 0.0], [0.0, 4.0]])).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_heat_maps_of_all_sizes():
    for q in (2, 20, 90):
        pixels = figures.picture(figures.heat_map(np.eye(q), [f"level {i}" for i in range(q)], "G"))
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert pixels.std() > 0
    figures.heat_map(np.zeros((2, 2)), ["a", "b"])


def test_caterpillar_is_in_order(sleep):
    figure = figures.caterpillar(sleep.blup("Subject"), "Subject")
    assert len(figure.axes) == 2
    x = figure.axes[0].lines[0].get_xdata()
    assert len(x) == 18
    assert list(x) == sorted(x)


def test_caterpillar_of_many_levels_shows_both_ends():
    blup = pd.DataFrame({"effect": "e", "level": [str(i) for i in range(100)], "blup": np.arange(100.0), "pev": 1.0})
    figure = figures.caterpillar(blup, most=10)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "1", "2", "3", "4", "95", "96", "97", "98", "99"]
