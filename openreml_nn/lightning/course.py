"""The course of a fit: how it stands after each step."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.fit import ALL_FIXED, theta_covariance
from openreml_nn.natural_scale import natural_scale
from openreml_nn.optim import Progress


class Course:
    """Progress of a fit after each step, and where the last complete step has led.

    Args:
        V: Covariance of the observations.
        history: Progress after each of the steps that were made before.
        seconds: Wall time of these.

    Attributes:
        history: Progress after each step.
        seconds: Wall time until now.
    """

    def __init__(self, V: Matrix, history: Sequence[Progress] = (), seconds: float = 0.0) -> None:
        self.V, self.history, self.seconds = V, list(history), seconds
        self.stand(V.theta)

    @property
    def progress(self) -> Progress | None:
        """How the fit stands after the last step."""
        return self.history[-1] if self.history else None

    @property
    def ended(self) -> str:
        """Why the fit has ended; empty while it goes on."""
        if self.progress is not None:
            return self.progress.reason if self.progress.done else ""
        return "" if self.V.free_index else ALL_FIXED

    @property
    def converged(self) -> bool:
        """Whether the fit has ended at a maximum."""
        return bool(self.ended) if self.progress is None else self.progress.converged

    def stand(self, theta: Tensor, information: np.ndarray | None = None) -> None:
        """Keep where a complete step has led.

        Args:
            theta: Raw thetas, shape (k,).
            information: Information of the free thetas there; None where it is not known.
        """
        self._theta, self._information = theta.detach(), information

    def take_back(self) -> None:
        """Set V to the thetas of the last complete step."""
        self.V.set_theta(self._theta)

    def natural_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimates and standard errors of the variance parameters after the last complete step.

        Returns:
            As ``V.natural_names`` are, each of shape (m,); standard errors are NaN before the first step.
        """
        V = self.V
        if self.progress is None or self._information is None:
            return V.natural(V.theta.detach()).cpu().numpy(), np.full(len(V.natural_names), math.nan)
        held = np.zeros(V.num_params, dtype=int)
        held[V.free_index] = self.progress.held
        covariance = theta_covariance(V, held, self._information)
        return natural_scale(V, self._theta, covariance, held.tolist())[:2]
