"""A variance times a known matrix: a pedigree's A, a genomic G, any kernel."""

import math
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.levels import tensor_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import Transform, TransformExpPow2


class KnownMatrix(Matrix):
    r"""V = σ² K, K known, symmetric, positive semi-definite and possibly singular.

    Args:
        K: Tensor or array-like of shape (n, n).
        trans: Transform of σ².
        start: Start value of σ².
        checked: K has passed ``check_kernel``, or is a principal part of one that has, and is not looked at again.

    Raises:
        ValueError: K is not square, finite, symmetric or positive semi-definite.

    Example:
        >>> from openreml_nn.covariance import KnownMatrix
        >>> KnownMatrix([[1.0, 0.5], [0.5, 1.0]], start=4.0)().tolist()
        [[4.0, 2.0], [2.0, 4.0]]
    """

    K: Tensor

    def __init__(self, K: Any, trans: Transform | None = None, *, start: Any = None, checked: bool = False) -> None:
        K = tensor_of(K).detach().to(torch.float64)
        K = K if checked else check_kernel(K)
        super().__init__((len(K), len(K)), ["sigma^2"], [trans or TransformExpPow2()], start=start)
        self.register_buffer("K", K, persistent=False)

    def build(self, params: Tensor) -> Tensor:
        return self.trans_params(params) * self.K.to(params.dtype)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.trans_params(params) * (self.K.to(params.dtype) @ rhs)

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.trans_params(params) * self.K[rows][:, columns].to(params.dtype)

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.trans_params(params) * self.K[rows, columns].to(params.dtype)

    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params) * self.K.diagonal().to(params.dtype)


def check_kernel(K: Tensor, name: str = "K") -> Tensor:
    """Return K, made exactly symmetric, or raise a ValueError that says what is wrong with it.

    Rounding is allowed: asymmetry and negative eigenvalues up to 1e-8 of the largest element.
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or len(K) == 0:
        raise ValueError(f"The kernel {name} must be square and not empty, got shape {tuple(K.shape)}.")
    largest = torch.stack(torch.aminmax(K)).abs().max().item()  # NaN where any element is
    if not math.isfinite(largest):
        raise ValueError(f"The kernel {name} holds missing or infinite values.")
    tolerance, given = 1e-8 * largest, K
    K = (K + K.mT).mul_(0.5)
    asymmetry = 2.0 * torch.stack(torch.aminmax(given - K)).abs().max().item()
    if asymmetry > tolerance:
        raise ValueError(f"The kernel {name} must be symmetric; K and its transpose differ by up to {asymmetry:.3g}.")
    diagonal = K.diagonal().clone()
    K.diagonal().add_(tolerance)
    failed = bool(torch.linalg.cholesky_ex(K).info)
    K.diagonal().copy_(diagonal)
    if failed:
        smallest = torch.linalg.eigvalsh(K)[0].item()
        if smallest < -tolerance:
            raise ValueError(
                f"The kernel {name} must be positive semi-definite; its smallest eigenvalue is {smallest:.3g}. "
                f"Set negative eigenvalues to zero, or check how it was computed."
            )
    return K
