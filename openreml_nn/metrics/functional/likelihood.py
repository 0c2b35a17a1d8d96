"""The likelihood of data that come in independent clusters, per row."""

import torch
from torch import Tensor

from openreml_nn.metrics.functional.checks import as_float64


def negative_loglik_per_row(loss: Tensor, rows: Tensor | int) -> Tensor:
    r"""Σ −ℓ / Σ n over independent clusters, or batches of them: the marginal negative log-likelihood of a row.

    ℓ of independent clusters adds up only where all of them share given fixed effects, as in −log N(y; f(x), V): the
    restricted likelihood of all rows is not the sum of those of its parts.

    Args:
        loss: −ℓ of each cluster or batch of clusters, with its constants, of any shape. The loss of a `MixedModelHead`
            is −ℓ per row already: of it give ``loss * len(y)``.
        rows: Number of rows of each of them, of the same shape, or the total of all.

    Returns:
        A number, shape ().

    Raises:
        TypeError: ``loss`` is no real tensor, or ``rows`` is not of whole numbers.
        ValueError: Shapes differ, a loss is not finite, or a number of rows is negative.

    Example:
        >>> import torch
        >>> negative_loglik_per_row(torch.tensor([12.0, 20.0]), torch.tensor([3, 5]))
        tensor(4., dtype=torch.float64)
        >>> from openreml_nn.nn import Effects, MixedModelHead
        >>> head, y, site = MixedModelHead({"site": Effects(2)}), torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0, 0, 1])
        >>> with torch.no_grad():
        ...     loss = head(torch.zeros(3), y, site)
        >>> torch.equal(negative_loglik_per_row(loss * len(y), rows=len(y)), loss)
        True
    """
    total, n = loglik_sums("negative_loglik_per_row", loss, rows)
    return total / n


def loglik_sums(call: str, loss: Tensor, rows: Tensor | int) -> Tensor:
    """Σ −ℓ and Σ n, shape (2,)."""
    total = as_float64(call, "loss", loss)
    n = torch.tensor(rows) if isinstance(rows, int) else rows
    if not isinstance(n, Tensor) or n.is_floating_point() or n.is_complex():
        raise TypeError(f"`{call}` needs whole numbers as `rows`, got {rows!r}.")
    if n.ndim and n.shape != total.shape:
        raise ValueError(
            f"`{call}` needs a number of rows for each loss, got shapes {tuple(n.shape)} and {tuple(total.shape)}."
        )
    if not bool(torch.isfinite(total.detach()).all()) or bool((n < 0).any()):
        raise ValueError(f"`{call}` needs finite losses and numbers of rows of at least 0, got {loss} and {rows}.")
    return torch.stack([total.sum(), n.sum().to(total)])
