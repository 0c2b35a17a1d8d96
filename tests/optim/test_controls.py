"""Step controls: each step is the best of its model within its reach."""

import numpy as np
import pytest

from openreml_nn.optim import FixedStep, Halving, TrustRegion
from openreml_nn.optim.controls import newton_step

G = np.array([1.0, -2.0, 0.5])
ROOT = np.array([[2.0, 0.3, 0.1], [0.0, 1.0, -0.4], [0.0, 0.0, 0.5]])
H = ROOT @ ROOT.T
INDEFINITE = np.diag([2.0, -1.0, 1.0])
SINGULAR = np.diag([2.0, 1.0, 0.0])


def model(H: np.ndarray, step: np.ndarray) -> float:
    return float(G @ step - 0.5 * step @ H @ step)


def test_newton_step() -> None:
    np.testing.assert_allclose(newton_step(H, G), np.linalg.solve(H, G))
    np.testing.assert_allclose(newton_step(SINGULAR, G), [0.5, -2.0, 0.0])
    np.testing.assert_allclose(newton_step(INDEFINITE, G), [0.5, 0.0, 0.5])
    assert newton_step(np.zeros((0, 0)), np.zeros(0)).shape == (0,)


def test_trust_region_takes_the_full_step_where_it_fits() -> None:
    np.testing.assert_allclose(TrustRegion().step(H, G, 1e3), np.linalg.solve(H, G), rtol=1e-10)


@pytest.mark.parametrize("matrix", [H, INDEFINITE, SINGULAR, np.zeros((3, 3)), 1e-20 * H, 1e20 * H])
@pytest.mark.parametrize("radius", [1e-6, 0.1, 2.0])
def test_trust_region_is_the_best_in_its_ball(matrix: np.ndarray, radius: float) -> None:
    step = TrustRegion().step(matrix, G, radius)
    assert np.linalg.norm(step) <= radius * (1 + 1e-5)
    directions = np.random.default_rng(0).normal(size=(500, 3))
    inside = radius * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    best = max(model(matrix, t * d) for d in inside for t in (1.0, 0.5))
    assert model(matrix, step) >= best - 1e-5 * abs(best)


def test_radius_follows_the_model() -> None:
    control = TrustRegion(radius=1.0, most=3.0)
    assert control.first_radius == 1.0
    assert control.after_acceptance(1.0, 1.0, 0.9) == 2.0
    assert control.after_acceptance(2.0, 2.0, 0.9) == 3.0
    assert control.after_acceptance(1.0, 0.2, 0.9) == 1.0
    assert control.after_acceptance(1.0, 1.0, 0.5) == 1.0
    assert control.after_acceptance(1.0, 0.8, 0.1) == 0.4
    assert control.after_rejection(1.0, 0.8) == 0.2
    assert control.after_rejection(1.0, 1e-13) is None


def test_halving() -> None:
    control = Halving(most=2)
    np.testing.assert_allclose(control.step(H, G, control.first_radius), np.linalg.solve(H, G))
    assert control.after_rejection(1.0, 9.0) == 0.5
    assert control.after_rejection(0.5, 9.0) == 0.25
    assert control.after_rejection(0.25, 9.0) is None
    assert control.after_acceptance(0.25, 9.0, 0.1) == 1.0


def test_fixed_step() -> None:
    control = FixedStep(0.5)
    np.testing.assert_allclose(control.step(H, G, control.first_radius), 0.5 * np.linalg.solve(H, G))
    assert control.after_rejection(0.5, 1.0) is None
    assert control.after_acceptance(0.5, 1.0, 0.1) == 0.5
