"""A multilayer perceptron, so that a configuration needs no code of its own."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with ReLU in between, and dropout where it is asked for.

    Args:
        inputs: Number of inputs d.
        hidden: Sizes of the hidden layers.
        outputs: Number of outputs; None for the last hidden layer as it is, the features of a head of mode
            ``"features"``.
        dropout: Probability that a hidden unit is left out in training.

    Raises:
        ValueError: A size is less than 1, or inputs of another number come.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import MLP
        >>> MLP(3, [16, 8])(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def __init__(self, inputs: int, hidden: Sequence[int] = (64, 32), outputs: int | None = 1, dropout: float = 0.0):
        sizes = [inputs, *hidden]
        if min([*sizes, 1 if outputs is None else outputs]) < 1:
            raise ValueError(f"`MLP` needs sizes of 1 or more, got {sizes} and {outputs} outputs.")
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        super().__init__(*layers, *([] if outputs is None else [nn.Linear(sizes[-1], outputs)]))
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs:
            raise ValueError(f"This `MLP` was made for {self.inputs} inputs, got {x.shape[-1]}. Set `inputs`.")
        return super().forward(x)
