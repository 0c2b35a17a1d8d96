"""Transforms of ``torch.func``: values of the tensors that they follow cannot be looked at or written in place."""

import torch
from torch import Tensor


def transforming() -> bool:
    """Whether a transform is at work; ``torch.compile``, which cannot ask this, is told of none."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_watched(*tensors: Tensor) -> bool:
    """Whether ``grad``, ``vmap`` or another transform follows one of the tensors, or a batch of gradients is taken."""
    ways = (torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor)
    return any(wrapped(x) for x in tensors for wrapped in ways)
