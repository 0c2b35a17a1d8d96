"""Variance parameters on the scale of a report, with standard errors by the delta method."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix, UnstructuredMatrix
from openreml_nn.optim.host import to_host


def natural_scale(
    V: Matrix, theta: Tensor, theta_cov: np.ndarray, held: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variance parameters on their natural scale and their standard errors, by the delta method.

    Args:
        V: Covariance of the observations.
        theta: Raw thetas, shape (k,).
        theta_cov: Their covariance, shape (k, k), NaN in rows of parameters that were not estimated.
        held: −1 or 1 for a theta on its lower or upper boundary, else 0.

    Returns:
        (estimates, standard errors, which thetas each depends on); shapes (m,), (m,), (m, k). Estimates are at the
        boundary where a theta is held there; the standard error is NaN where no estimated theta is involved.
    """
    estimate, J = _natural_and_jacobian(V, theta, _limit(theta, held))
    variance = np.clip(_by_delta_method(J, theta_cov).diagonal(), 0.0, None)
    return estimate, np.sqrt(variance), J != 0


def natural_covariance(V: Matrix, theta: Tensor, theta_cov: np.ndarray) -> np.ndarray:
    """Covariance of the variance parameters on their natural scale, by the delta method; arguments as there.

    Returns:
        Shape (m, m); NaN in rows and columns of parameters in which no estimated theta is involved.
    """
    return _by_delta_method(_natural_and_jacobian(V, theta, theta)[1], theta_cov)


def correlations(V: Matrix, theta: Tensor, held: Sequence[int]) -> np.ndarray:
    """The correlation beside each covariance of an unstructured matrix; arguments as in `natural_scale`.

    Returns:
        Shape (m,); NaN for every other natural parameter, and beside a variance of zero.
    """
    limit, found = _limit(theta, held), []
    for _, leaf, index in V.leaves():
        values = limit.new_full((len(leaf.natural_names),), math.nan)
        if isinstance(leaf, UnstructuredMatrix):
            rows, columns = torch.tril_indices(*leaf.shape, device=limit.device)
            values = torch.where(rows == columns, values, leaf.correlation(limit[index])[rows, columns])
        found.append(values)
    return to_host(torch.cat(found))[0]


def _limit(theta: Tensor, held: Sequence[int]) -> Tensor:
    """θ with infinity where a parameter is held at a boundary."""
    on = torch.tensor(list(held), dtype=theta.dtype, device=theta.device)
    return torch.where(on == 0, theta, on * math.inf)


def _by_delta_method(J: np.ndarray, theta_cov: np.ndarray) -> np.ndarray:
    """J C J' with what was not estimated taken as known; NaN where nothing is left."""
    estimated = ~np.isnan(np.diag(theta_cov))
    C = np.where(np.outer(estimated, estimated), theta_cov, 0.0)
    depends = (J[:, estimated] != 0).any(axis=1)
    return np.where(np.outer(depends, depends), J @ C @ J.T, math.nan)


def _natural_and_jacobian(V: Matrix, theta: Tensor, limit: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``V.natural(limit)`` and the Jacobian of ``V.natural`` at θ, shapes (m,) and (m, k), in one message.

    The Jacobian is a diagonal where a structure's natural parameters are elementwise.
    """
    leaves = [(leaf, index) for _, leaf, index in V.leaves()]
    curved = [torch.func.jacfwd(leaf.natural)(theta[index]) for leaf, index in leaves if not _is_elementwise(leaf)]
    estimate, slopes, *own = to_host(V.natural(limit), V.trans_grad(theta), *curved)
    blocks = [np.zeros((0, len(theta)))]
    for leaf, index in leaves:
        block = np.diag(slopes[index]) if _is_elementwise(leaf) else own.pop(0)
        blocks.append(np.zeros((len(block), len(theta))))
        blocks[-1][:, index] = block
    return estimate, np.concatenate(blocks)


def _is_elementwise(leaf: Matrix) -> bool:
    return type(leaf).natural is Matrix.natural
