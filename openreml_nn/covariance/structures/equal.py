"""Structures with equal entries: one covariance for all pairs of levels."""

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from openreml_nn.covariance.levels import size_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import Transform, TransformExpPow2, TransformSigmoid


def _between(n: int) -> Transform:
    """ρ between −1/(n − 1) and 1, where (1 − ρ) I + ρ J is positive definite."""
    return TransformSigmoid(-1.0 / (n - 1) if n > 1 else -1.0, 1.0)


class EqualEntryMatrix(Matrix):
    r"""V = σ² J, J the matrix of ones: what all levels have in common. Positive semi-definite, of rank 1.

    Args:
        n: Size, or `Levels`.
        trans: Transform of σ².
        start: Start value of σ².
    """

    def __init__(self, n: SupportsIndex, trans: Transform | None = None, *, start: Any = None) -> None:
        size = size_of(n, "EqualEntryMatrix")
        super().__init__((size, size), ["sigma^2"], [trans or TransformExpPow2()], start=start)

    def build(self, params: Tensor) -> Tensor:
        return self.trans_params(params).expand(self.shape)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.trans_params(params) * rhs.sum(0, keepdim=True).expand(self.shape[0], -1)


class EquicorrelationMatrix(Matrix):
    r"""V = (1 − ρ) I + ρ J, with −1/(n − 1) < ρ < 1.

    Args:
        n: Size, or `Levels`; with a single level ρ has no effect.
        start: Start value of ρ.
    """

    def __init__(self, n: SupportsIndex, *, start: Any = None) -> None:
        size = size_of(n, "EquicorrelationMatrix")
        super().__init__((size, size), ["rho"], [_between(size)], start=start)

    def build(self, params: Tensor) -> Tensor:
        (rho,) = self.trans_params(params)
        I = torch.eye(self.shape[0], dtype=params.dtype, device=params.device)
        return (1.0 - rho) * I + rho

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        (rho,) = self.trans_params(params)
        return (1.0 - rho) * rhs + rho * rhs.sum(0)


class CompoundSymmetricMatrix(Matrix):
    r"""V = σ² [(1 − ρ) I + ρ J], with −1/(n − 1) < ρ < 1: one variance, one correlation.

    Args:
        n: Size, or `Levels`; with a single level ρ has no effect.
        start: Start values of σ² and ρ.

    Example:
        >>> from openreml_nn.covariance import CompoundSymmetricMatrix
        >>> V = CompoundSymmetricMatrix(3, start=[4.0, 0.25])
        >>> V().detach().round(decimals=6)[0].tolist()
        [4.0, 1.0, 1.0]
    """

    def __init__(self, n: SupportsIndex, *, start: Any = None) -> None:
        size = size_of(n, "CompoundSymmetricMatrix")
        super().__init__((size, size), ["sigma^2", "rho"], [TransformExpPow2(), _between(size)], start=start)

    def build(self, params: Tensor) -> Tensor:
        sigma2, rho = self.trans_params(params)
        I = torch.eye(self.shape[0], dtype=params.dtype, device=params.device)
        return sigma2 * ((1.0 - rho) * I + rho)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        sigma2, rho = self.trans_params(params)
        return sigma2 * ((1.0 - rho) * rhs + rho * rhs.sum(0))
