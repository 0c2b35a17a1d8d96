"""A short description of what a covariance has fixed, as the entries of a kernel, for a saved state to compare."""

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix

TOLERANCE = 1e-9  # of the sum of absolute values: sums on another device are rounded otherwise


def fixed_values(G: Matrix) -> dict[str, list[float]]:
    """Sum of absolute values and a weighted sum of each real buffer that no ``state_dict`` holds, by name."""
    held = set(G.state_dict())
    return {
        name: _sums(buffer)
        for name, buffer in G.named_buffers()
        if name not in held and buffer.is_floating_point() and not buffer.is_meta
    }


def differing(saved: dict[str, list[float]], own: dict[str, list[float]]) -> list[str]:
    """Names of the fixed values that two covariances have in common and that differ."""
    return [
        name
        for name in sorted(saved.keys() & own.keys())
        if any(abs(a - b) > TOLERANCE * own[name][0] for a, b in zip(saved[name], own[name], strict=True))
    ]


@torch.no_grad()
def _sums(values: Tensor) -> list[float]:
    table = values.to(torch.float64).reshape(len(values) if values.ndim else 1, -1)
    rows, columns = (torch.arange(1.0, size + 1.0, dtype=table.dtype, device=table.device) for size in table.shape)
    return torch.stack([torch.linalg.vector_norm(table, 1), rows.cos() @ (table @ columns.sin())]).tolist()
