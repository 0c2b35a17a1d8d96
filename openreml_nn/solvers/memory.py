"""Memory, asked for before it is taken."""

import psutil
import torch

ADVICE = "Take a solver that uses the structure of V, or fewer rows."


def require_memory(needed: int, device: torch.device, what: str, advice: str = ADVICE) -> None:
    """Raise a MemoryError where ``needed`` bytes are not free on the device.

    Args:
        needed: Bytes.
        device: Where they are needed.
        what: What needs them, with its size: the beginning of the message.
        advice: What to do instead: its end.
    """
    available = _free_on_gpu(device) if device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(
            f"{what} needs about {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free. {advice}"
        )


def _free_on_gpu(device: torch.device) -> int:
    """Free bytes of a GPU, those included that torch has taken from it and holds ready."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
