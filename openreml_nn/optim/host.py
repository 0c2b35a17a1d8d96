"""Numbers for the host: a read waits for all that its device has still to do, so what is wanted comes in one."""

import numpy as np
import torch
from torch import Tensor


def to_host(*parts: Tensor) -> list[np.ndarray]:
    """Tensors of one device as float64 arrays of their shapes, by one transfer."""
    flat = torch.cat([part.detach().reshape(-1).to(torch.float64) for part in parts]).cpu().numpy()
    arrays, begin = [], 0
    for part in parts:
        end = begin + part.numel()
        arrays.append(flat[begin:end].reshape(part.shape))
        begin = end
    return arrays
