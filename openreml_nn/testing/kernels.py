"""Known matrices for tests."""

import torch
from torch import Tensor


def random_kernel(q: int, seed: int = 1) -> Tensor:
    """A positive definite K = WW'/q, W of shape (q, q + 2) with normal elements; the same one for the same seed.

    Args:
        q: Number of levels.
        seed: Seed of the elements.

    Returns:
        Shape (q, q), float64.
    """
    W = torch.randn(q, q + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return W @ W.mT / q
