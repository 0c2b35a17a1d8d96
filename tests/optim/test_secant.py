"""The curvature that an information matrix leaves out, from successive scores."""

import numpy as np
import pytest

from openreml_nn.optim.secant import predicts_better, updated

rng = np.random.default_rng(4)
H = np.diag([4.0, 2.0, 1.0])
MISSING = np.array([[0.5, 0.2, 0.0], [0.2, -0.6, 0.1], [0.0, 0.1, 0.3]])


def test_update_holds_along_the_last_step() -> None:
    S = np.zeros((3, 3))
    for _ in range(4):
        step = rng.normal(size=3)
        S = updated(S, H, step, (H + MISSING) @ step)
        np.testing.assert_allclose((H + S) @ step, (H + MISSING) @ step)
        np.testing.assert_allclose(S, S.T)


def test_nothing_is_learnt_where_nothing_is_missing() -> None:
    step = rng.normal(size=3)
    assert not updated(np.zeros((3, 3)), H, step, H @ step).any()
    np.testing.assert_allclose(updated(MISSING, H, step, (H + MISSING) @ step), MISSING, atol=1e-12)


def test_a_vanishing_denominator_changes_nothing() -> None:
    step, across = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    assert not updated(np.zeros((3, 3)), H, step, H @ step + across).any()


def test_too_large_a_claim_is_shrunk() -> None:
    step = np.array([1.0, 0.0, 0.0])
    S = updated(100.0 * np.eye(3), H, step, H @ step + 0.5 * step)
    np.testing.assert_allclose(S, 0.5 * np.eye(3))


@pytest.mark.parametrize(
    ("S", "better"), [(MISSING, True), (0.1 * MISSING, False), (-MISSING, False), (0.0 * H, False)]
)
def test_choice(S: np.ndarray, better: bool) -> None:
    g, step = np.array([1.0, 2.0, 3.0]), np.array([0.5, -0.5, 1.0])
    gain = float(g @ step - 0.5 * step @ (H + MISSING) @ step)
    assert predicts_better(S, H, g, step, gain) == better


def test_the_mean_information_leaves_what_is_missing() -> None:
    """With an information h + c x that grows along the step and a missing curvature of 0.3, exactly 0.3 is learnt."""

    def score(x: float) -> float:
        return 5.0 - (2.0 + 0.3) * x - 0.5 * 1.5 * x**2

    step = np.array([0.8])
    mean = np.array([[0.5 * (2.0 + (2.0 + 1.5 * 0.8))]])
    S = updated(np.zeros((1, 1)), mean, step, np.array([score(0.0) - score(0.8)]))
    np.testing.assert_allclose(S, [[0.3]])
