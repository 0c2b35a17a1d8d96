"""What an optimiser asks of an objective: its parameters as one vector, and its numbers at one point after another."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openreml_nn.optim.geometry import Geometry
from openreml_nn.optim.host import to_host
from openreml_nn.solvers import NotPositiveDefinite


@dataclass(frozen=True)
class Point:
    """What the host knows of the objective at one θ.

    Attributes:
        loss: −ℓ.
        theta: θ, as the parameters hold it, shape (k,).
        score: ∂ℓ/∂θ.
        information: Shape (k, k).
        units: Units of the parameters.
    """

    loss: float
    theta: np.ndarray
    score: np.ndarray
    information: np.ndarray
    units: np.ndarray


class Points:
    """The parameters that are moved, and the objective where they are.

    Args:
        groups: Groups of an optimiser, one, with parameters of any shape; those with ``requires_grad`` are moved.
        information: Gives the (k, k) information at the thetas of the closure's last call.
        geometry: What is known of the k parameters, or a function that gives it at their present values.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        information: Callable[[], Tensor],
        geometry: Geometry | Callable[[], Geometry] | None,
    ) -> None:
        self._groups, self._information, self._geometry = groups, information, geometry
        self._left: list[tuple[int, int]] | None = None

    @property
    def moved(self) -> list[nn.Parameter]:
        """The parameters that are moved."""
        return [p for p in self._groups[0]["params"] if p.requires_grad]

    @property
    def count(self) -> int:
        """k, the numbers in them."""
        return sum(p.numel() for p in self.moved)

    def geometry(self) -> Geometry:
        """What is known of them at their present values."""
        return self._geometry() if callable(self._geometry) else self._geometry or Geometry.plain(self.count)

    def at_present(
        self, closure: Callable[[], Any], units: np.ndarray | Tensor | None, most: float = math.inf
    ) -> Point:
        """What the host has to know of the present thetas, in one message from their device.

        Args:
            closure: Computes the loss and its gradients, and returns the loss.
            units: Units of the parameters where they are known; None where they follow from the present thetas.
            most: Loss from which on a point is not wanted; on the CPU, where a look costs nothing, the information is
                not computed there, and the arrays are empty.

        Raises:
            ValueError: The information has another shape.
        """
        with torch.enable_grad():
            loss = closure()
        if isinstance(loss, Tensor) and loss.device.type == "cpu" and loss >= most:
            return Point(float(loss.detach()), *[np.zeros(0)] * 4)
        moved, k = self.moved, self.count
        H = self._information()
        if H.shape != (k, k):
            raise ValueError(f"`information` must give a matrix of shape ({k}, {k}), got {tuple(H.shape)}.")
        theta = torch.cat([p.reshape(-1) for p in moved])
        score = -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in moved])
        message = [torch.as_tensor(loss, device=theta.device), theta, score, H]
        own = self.geometry().units if units is None else units
        if isinstance(own, Tensor):
            *numbers, own = to_host(*message, own)
        else:
            numbers = to_host(*message)
        return Point(float(numbers[0]), numbers[1], numbers[2], numbers[3], own)

    def trial(self, closure: Callable[[], Any], units: np.ndarray | None, most: float) -> Point | None:
        """The same at a trial point; None where V has no Cholesky factor or ℓ is no number there."""
        try:
            at = self.at_present(closure, units, most)
        except (NotPositiveDefinite, torch.linalg.LinAlgError):
            return None
        return at if math.isfinite(at.loss) else None

    def write(self, theta: np.ndarray, grad: np.ndarray | None = None) -> None:
        """Set the parameters, and their gradients where they are given, from vectors of shape (k,)."""
        moved = self.moved
        sizes = [p.numel() for p in moved]
        for p, value in zip(moved, torch.from_numpy(theta).to(moved[0]).split(sizes), strict=True):
            p.copy_(value.view_as(p))
        if grad is not None:
            for p, value in zip(moved, torch.from_numpy(grad).to(moved[0]).split(sizes), strict=True):
                p.grad = value.reshape(p.shape).clone()

    # ---- whether anybody else moves them -----------------------------------------------------------------------------

    def remember(self) -> None:
        """Keep the marks of the parameters for ``were_moved``."""
        self._left = self._marks()

    def were_moved(self, theta: np.ndarray) -> bool:
        """Whether the parameters are not at ``theta``, where the last step left them. A GPU is seldom asked."""
        if self._left == self._marks() and not all(p.is_cpu for p in self.moved):
            return False
        return not np.array_equal(theta, np.concatenate([x.reshape(-1) for x in to_host(*self.moved)]))

    def _marks(self) -> list[tuple[int, int]]:
        """What changes where anybody replaces the parameters or writes into them, but not through their ``data``."""
        return [(p._version, p.data_ptr()) for p in self.moved]
