"""How many threads pay: those that wait for one another at the end of a short operation take longer than one alone."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

FEW_NUMBERS = 2**18  # in the largest array of a computation
FEW_MULTIPLICATIONS = 2e7  # in its factorisations


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for thousands of short operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_for(numbers: float, multiplications: float = 0.0) -> AbstractContextManager[None]:
    """One thread for a small computation, else as many as PyTorch has.

    Args:
        numbers: Elements of its largest array.
        multiplications: Those of its factorisations and products of matrices.
    """
    return one_thread() if numbers < FEW_NUMBERS and multiplications < FEW_MULTIPLICATIONS else nullcontext()
