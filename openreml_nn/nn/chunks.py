"""A network over all rows in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(network: Callable[..., Tensor], x: Tensor | Sequence[Tensor], rows: int) -> Tensor:
    """``network(x)`` by pieces of rows, whose activations are not kept but computed again in the backward pass.

    The same output and gradients as ``network(x)`` for a network that treats each row by itself, at one more forward
    pass; memory is that of one piece and of the output. Dropout draws the same mask in both passes. A batch
    normalisation in training takes the statistics of each piece, not of all rows, and counts each piece twice.

    Args:
        network: Function of one or several tensors of the same number of rows.
        x: Its input, shape (n, ...), or several inputs.
        rows: Rows of a piece.

    Returns:
        Its output for all rows, shape (n, ...).

    Raises:
        ValueError: ``rows`` is less than 1, or the inputs have different lengths.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import in_chunks
        >>> network = torch.nn.Linear(3, 1)
        >>> in_chunks(network, torch.zeros(10, 3), rows=4).shape
        torch.Size([10, 1])
    """
    if rows < 1:
        raise ValueError(f"`in_chunks` needs at least 1 row in a piece, got {rows}.")
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    if len({len(part) for part in inputs}) != 1:
        raise ValueError(f"`in_chunks` needs inputs of one length, got {[len(part) for part in inputs]}.")
    pieces = list(zip(*(part.split(rows) for part in inputs), strict=True))
    if len(pieces) == 1:  # nothing is gained by computing it again
        return network(*pieces[0])
    if not torch.is_grad_enabled():
        return torch.cat([network(*piece) for piece in pieces])
    return torch.cat([checkpoint(network, *piece, use_reentrant=False) for piece in pieces])
