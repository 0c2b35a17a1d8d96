"""Number, mean and sum of squared deviations of rows as one tensor, which two processes can merge.

A sum of squares and a square of a sum lose all digits of a variance where the mean is large; deviations from the mean
do not. Merging needs count, mean and deviations together, so they are one state of a metric, with `merge_moments` as
its reduction over batches and processes.

Source: Chan, Golub & LeVeque (1983), The American Statistician 37, 242-247.
"""

import math

import torch
from torch import Tensor


def no_moments(size: int) -> Tensor:
    """The moments of no rows of a size, a float64 tensor of length 1 + k + k²."""
    return torch.zeros(1 + size + size**2, dtype=torch.float64)


def moments(rows: Tensor) -> Tensor:
    """Count n, mean m and Σ (x − m)(x − m)' of rows of shape (n, k), flat: length 1 + k + k²."""
    n = rows.shape[0]
    mean = rows.sum(0) / max(n, 1)
    left = rows - mean
    correction = left.sum(0) / max(n, 1)  # what rounding has left of the mean
    left = left - correction
    return torch.cat([rows.new_full((1,), n), mean + correction, (left.mT @ left).flatten()])


def merge_moments(parts: Tensor) -> Tensor:
    """The moments of all rows from those of their parts, shape (number of parts, 1 + k + k²)."""
    n, mean, deviations = split_moments(parts)
    total = n.sum()
    weight = (n / total.clamp(min=1))[:, None]
    merged = (weight * mean).sum(0)
    apart = mean - merged
    correction = (weight * apart).sum(0)
    apart = apart - correction
    between = (n[:, None] * apart).mT @ apart
    return torch.cat([total[None], merged + correction, (deviations.sum(0) + between).flatten()])


def split_moments(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and deviations, of shapes (...), (..., k) and (..., k, k), from moments (..., 1 + k + k²)."""
    size = math.isqrt(packed.shape[-1] - 1)
    deviations = packed[..., 1 + size :].reshape(*packed.shape[:-1], size, size)
    return packed[..., 0], packed[..., 1 : 1 + size], deviations
