"""How many threads pay: those that wait for one another at the end of a short operation take longer than one alone."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

FEW_NUMBERS = 2**18  # in the largest array of a computation
FEW_MULTIPLICATIONS = 2e7  # in its factorisations


class _Usual(threading.local):
    """How many threads PyTorch has beside the blocks of `one_thread`, and whether this thread of Python is in one."""

    inside = False
    lock = threading.Lock()
    blocks = 0  # of all threads of Python
    threads = 1


_usual = _Usual()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch for thousands of short operations; NumPy and SciPy have threads of their own.

    The number is a setting of each thread of Python, but one that begins takes over that of the last who set it.
    """
    if _usual.inside:
        yield
        return
    with _Usual.lock:
        if not _Usual.blocks:
            _Usual.threads = torch.get_num_threads()
        _Usual.blocks += 1
        threads = _Usual.threads
        torch.set_num_threads(1)
    _usual.inside = True
    try:
        yield
    finally:
        _usual.inside = False
        with _Usual.lock:
            _Usual.blocks -= 1
            torch.set_num_threads(threads)


def threads_for(numbers: float, multiplications: float = 0.0) -> AbstractContextManager[None]:
    """One thread for a small computation, else as many as PyTorch has.

    Args:
        numbers: Elements of its largest array.
        multiplications: Those of its factorisations and products of matrices.
    """
    return one_thread() if numbers < FEW_NUMBERS and multiplications < FEW_MULTIPLICATIONS else nullcontext()
