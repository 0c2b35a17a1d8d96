"""Progress of optimizers that do not tell it, such as those of ``torch.optim``."""

import math

import numpy as np
import torch
from torch import Tensor

from openreml_nn.objectives import Objective
from openreml_nn.optim import Progress, newton_decrement
from openreml_nn.optim.host import to_host
from openreml_nn.solvers import Evaluation


def measured_progress(
    objective: Objective,
    evaluation: Evaluation,
    information: Tensor,
    before: Tensor,
    tolerance: float,
    iteration: int,
    trials: int,
) -> tuple[Progress, np.ndarray]:
    """Progress at the thetas that an optimizer evaluated last, by the gradients that it has seen there.

    Args:
        objective: The objective, with V at the thetas to which the optimizer has moved since.
        evaluation: The last evaluation.
        information: Information of the free thetas there, shape (k, k).
        before: Raw thetas before the step.
        tolerance: Newton decrement at which the fit has converged.
        iteration: Number of the step.
        trials: Evaluations that it took.

    Returns:
        (progress, information on the host).
    """
    V = objective.V
    free = [p for p in V.theta_parameters() if p.requires_grad]
    gradient = torch.cat([p.grad if p.grad is not None else torch.zeros_like(p) for p in free])
    steps = torch.stack([V.theta, evaluation.theta.detach()]) - before
    loglik, g, H, moved = to_host(objective.loglik(evaluation), -gradient, information, steps)
    decrement = newton_decrement(H, g)
    done = decrement <= tolerance
    progress = Progress(
        iteration=iteration,
        loglik=float(loglik),
        score_norm=float(np.linalg.norm(g)),
        decrement=decrement,
        step_norm=float(np.linalg.norm(moved[int(done)])),
        step_length=math.nan,
        trials=trials,
        condition=float(np.linalg.cond(H)),
        held=(0,) * len(g),
        done=done,
        converged=done,
        reason="the score is zero" if done else "",
    )
    return progress, H
