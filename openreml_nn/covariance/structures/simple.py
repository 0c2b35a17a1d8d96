"""A fixed matrix: a tensor with the contract of `Matrix` and no parameters."""

from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.levels import tensor_of
from openreml_nn.covariance.matrix import Matrix


class SimpleMatrix(Matrix):
    r"""V = the given tensor, with no parameters.

    Args:
        values: Tensor or array-like of shape (rows, columns); kept in float64 if it is not floating point.

    Raises:
        ValueError: It does not have two dimensions.

    Example:
        >>> from openreml_nn.covariance import SimpleMatrix
        >>> SimpleMatrix([[1, 2], [3, 4]])().tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """

    values: Tensor

    def __init__(self, values: Any) -> None:
        values = tensor_of(values).detach()
        if values.ndim != 2:
            raise ValueError(f"`SimpleMatrix` needs a tensor of two dimensions, got shape {tuple(values.shape)}.")
        super().__init__((values.shape[0], values.shape[1]), [])
        self.register_buffer("values", values if values.is_floating_point() else values.to(torch.float64))

    def build(self, params: Tensor) -> Tensor:
        return self.values.to(params.dtype)
