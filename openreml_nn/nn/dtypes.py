"""Modules that stay in the precision they were made in, whatever a network around them is cast to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose parameters and buffers move to devices but keep their dtypes; for thetas, which are float64.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import Effects
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1), Effects(3)).to(torch.bfloat16)
        >>> network[0].weight.dtype, network[1].G.theta.dtype
        (torch.bfloat16, torch.float64)
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)
