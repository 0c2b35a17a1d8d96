"""What the metrics of mixed models share: states in float64, and an answer to a question asked too early."""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SummedMetric(Metric, ABC):
    """Base class of metrics whose state is a sum over rows or fits, so that batches and processes merge exactly.

    States are float64 and stay so when a module is cast to another type; ``set_dtype`` changes them where that is
    wanted. What a state is does not depend on options that `compute` alone uses, so that a
    ``torchmetrics.MetricCollection`` may share one state among metrics that differ in such options only.
    """

    full_state_update = False

    def require_updates(self, count: Tensor) -> None:
        """Raise a ValueError where nothing was counted because nothing was given, in any process."""
        if not self.update_called and not bool(count > 0):
            raise ValueError(f"`{type(self).__name__}.compute` needs data. Call `update` or `forward` before it.")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Figure and axes with one value or several, as of other torchmetrics; `compute` where none is given."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def same_type(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(fn if self._dtype_convert else same_type, exclude_state)
