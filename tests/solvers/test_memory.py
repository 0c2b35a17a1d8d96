"""Memory is asked for before it is taken, also that of a GPU."""

import pytest
import torch

from openreml_nn.solvers.memory import require_memory

GIB = 2**30


def test_too_much() -> None:
    require_memory(1024, torch.device("cpu"), "This")
    with pytest.raises(MemoryError, match=r"This needs about 1048576.0 GiB, and .* GiB are free. Take less."):
        require_memory(GIB * 2**20, torch.device("cpu"), "This", "Take less.")


def test_what_torch_holds_ready_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free on the device 1 GiB; torch has taken 6 GiB, of which tensors have 2."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    require_memory(5 * GIB, torch.device("cuda"), "This")
    with pytest.raises(MemoryError, match=r"about 5.1 GiB, and 5.0 GiB are free"):
        require_memory(int(5.1 * GIB), torch.device("cuda"), "This")
