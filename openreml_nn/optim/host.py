"""Numbers for the host: a read waits for all that its device has still to do, so what is wanted comes in one."""

import numpy as np
import torch
from torch import Tensor


def to_host(*parts: Tensor) -> list[np.ndarray]:
    """Tensors of one device as float64 arrays of their shapes, by one transfer."""
    flat = torch.cat([part.detach().reshape(-1).to(torch.float64) for part in parts]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in parts])
    return [own.reshape(part.shape) for own, part in zip(np.split(flat, ends[:-1]), parts, strict=True)]
