"""What an information matrix leaves out of the curvature of ℓ, learnt from the scores of successive steps.

Average information is the curvature of a likelihood whose V is linear in its parameters. Where V is not (a correlation,
a range, a loading near zero), steps with it alone approach the maximum by a constant factor each. The difference, a
symmetric matrix S, is estimated by symmetric rank-one updates and used while it predicts the gains clearly better.

Source: Dennis, Gay & Welsch (1981), ACM Transactions on Mathematical Software 7, 348-368.
"""

import numpy as np

from openreml_nn.optim.controls import NOTHING

CLEARLY = 0.5  # error of the predicted gain with S over that without, below which S is used
SMALLEST = 1e-6  # relative denominator below which an update is left out


def predicts_better(S: np.ndarray, H: np.ndarray, g: np.ndarray, step: np.ndarray, gain: float) -> bool:
    """Whether H + S foretold the gain of a step clearly better than H, the information before it."""
    without = float(g @ step - 0.5 * step @ H @ step)
    return abs(without - 0.5 * float(step @ S @ step) - gain) < CLEARLY * abs(without - gain)


def updated(S: np.ndarray, H: np.ndarray, step: np.ndarray, fall: np.ndarray) -> np.ndarray:
    """S after a step along which the score fell by ``fall``, H being the mean of the information before and after it.

    (H + S) ``step`` = ``fall`` holds afterwards; S is shrunk first where it claims more than was seen. With the mean,
    what is learnt from a long step has an error of the third order in its length, as the trapezoidal rule.
    """
    left, claimed = fall - H @ step, S @ step
    size = abs(float(step @ claimed))
    if size > 0:
        shrink = min(1.0, abs(float(step @ left)) / size)
        S, claimed = shrink * S, shrink * claimed
    r, scale = left - claimed, 1.0 / np.sqrt(np.maximum(H.diagonal(), NOTHING))
    denominator = float(r @ step)
    if abs(denominator) <= SMALLEST * float(np.linalg.norm(r * scale) * np.linalg.norm(step / scale)):
        return S
    return S + np.outer(r, r) / denominator
