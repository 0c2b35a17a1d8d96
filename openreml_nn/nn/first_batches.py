"""What the first two batches of a training tell of it: warnings before the long work.

They see y far from what the network gives, for which there is an offset, and rows of one level in two batches, whose
covariance with each other the likelihood of a batch leaves out.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from openreml_nn.nn.batch import BatchTerm

ENOUGH_ROWS, ENOUGH_LEVELS = 10, 5  # of which a mean says something
FAR, FAR_OF_FEW_LEVELS = 3.0, 15.0  # standard deviations of y; few levels can have large effects in common


class FirstBatches:
    """Looks at the first two batches of a training, and never again.

    Attributes:
        done: Whether it has seen two batches.
    """

    def __init__(self) -> None:
        self.done = False
        self._before: dict[str, dict[int, tuple[float, float]]] | None = None

    def look(self, r: Tensor | None, y: Tensor, terms: Mapping[str, BatchTerm]) -> None:
        """Look at a batch of a training.

        Args:
            r: y − f, shape (m,); None where the mean of f is fitted.
            y: Response, shape (m,).
            terms: What the batch says of each factor; none where the batch has all rows there are.

        Warns:
            UserWarning: The mean of y − f is far from 0, or levels of each factor have rows in both batches.
        """
        y = y.detach().to(torch.float64)
        sums = {name: _sums(term.codes, y) for name, term in terms.items()}
        if self._before is None:
            enough = all(len(sums[name]) >= min(ENOUGH_LEVELS, term.effects.num_levels) for name, term in terms.items())
            if r is not None:
                warn_of_mean(r, y, FAR if enough else FAR_OF_FEW_LEVELS)
            self._before = sums
            return
        if sums and all(_torn(self._before.get(name, {}), own) for name, own in sums.items()):
            names = ", ".join(map(repr, sums))
            warnings.warn(
                f"`MixedModelHead` got batches with different rows of the same levels of {names}, as `shuffle=True` "
                f"makes them. The likelihood of a batch leaves out their covariance: variances are learned slowly, and "
                f"with bias where the network takes up part of the effects. Give batches of whole clusters, "
                f"`DataLoader(data, batch_sampler=ClusterBatchSampler(codes, batch_size))`.",
                stacklevel=6,
            )
        self.done, self._before = True, None


def warn_of_mean(r: Tensor, y: Tensor, far: float = FAR) -> None:
    """Warn where y − f is far from 0 on average, as before the first step of a network without an offset.

    Args:
        r: y − f of a batch, shape (m,).
        y: Its response.
        far: Standard deviations of y that are far.

    Warns:
        UserWarning: The mean of y − f is farther.
    """
    mean, sd = torch.stack([r.detach().mean(), y.detach().to(r).std()]).tolist()
    if len(r) >= ENOUGH_ROWS and abs(mean) > far * sd > 0:
        warnings.warn(
            f"`MixedModelHead` got a first batch with y {mean:+.3g} away from what the network gives in the mean, "
            f"{abs(mean) / sd:.1f} standard deviations of y. Until the network has found this by a bias, which takes "
            f"long, the random effects stand in for it, and their variances come out far too large. Set the offset "
            f"before the training, `head.offset = y.mean()`; a `MixedModelRegressor` does so by itself unless "
            f"`start='current'`.",
            stacklevel=7,
        )


def _sums(codes: Tensor, y: Tensor) -> dict[int, tuple[float, float]]:
    """Number of rows and sum of y of each level."""
    levels, place = codes.unique(return_inverse=True)
    sums = y.new_zeros(len(levels), 2).index_add_(0, place, torch.stack([torch.ones_like(y), y], dim=1))
    return dict(zip(levels.tolist(), map(tuple, sums.tolist()), strict=True))


def _torn(before: Mapping[int, tuple[float, float]], now: Mapping[int, tuple[float, float]]) -> bool:
    """Whether a level has other rows in one batch than in another; the same rows are a cluster that came again."""
    return any(
        before[level][0] != own[0] or abs(before[level][1] - own[1]) > 1e-9 * (abs(own[1]) + own[0])
        for level, own in now.items()
        if level in before
    )
