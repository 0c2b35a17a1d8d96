"""What the first two batches of a training tell of it: warnings before the long work.

They see y far from what the network gives, for which there is an offset; variance parameters far from the variance of
y, for which there is `MixedModelHead.start`; and rows of one level in two batches, whose covariance with each other the
likelihood of a batch leaves out.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from openreml_nn.nn.batch import BatchTerm

ENOUGH_ROWS, ENOUGH_LEVELS = 10, 5  # of which a mean says something
FAR, FAR_OF_FEW_LEVELS = 3.0, 15.0  # standard deviations of y; few levels can have large effects in common
FAR_OFF = 10.0  # times the variance that the parameters say


class FirstBatches:
    """Looks at the first two batches of a training, and never again.

    Attributes:
        done: Whether it has seen two batches.
    """

    def __init__(self) -> None:
        self.done = False
        self._before: dict[str, dict[int, tuple[float, float]]] | None = None

    def look(self, r: Tensor, y: Tensor, terms: Mapping[str, BatchTerm], variance: float | None) -> None:
        """Look at a batch of a training.

        Args:
            r: y − f, or what features leave of y, shape (m,).
            y: Response, shape (m,).
            terms: What the batch says of each factor; none where the batch has all rows there are.
            variance: Variance of a row, z'Gz + σ², in the mean of the rows; None where no parameter is free to move.

        Warns:
            UserWarning: The mean of y − f is far from 0, its variance far from that of the parameters, or levels of
                each factor have rows in both batches.
        """
        y = y.detach().to(torch.float64)
        sums = {name: _sums(term.codes, y) for name, term in terms.items()}
        if self._before is None:
            enough = all(len(sums[name]) >= min(ENOUGH_LEVELS, term.effects.num_levels) for name, term in terms.items())
            warn_of_mean(r, y, FAR if enough else FAR_OF_FEW_LEVELS)
            if variance is not None:
                warn_of_variance(r, y, variance, enough)
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
    if len(r) < ENOUGH_ROWS:
        return
    mean, sd = torch.stack([r.detach().mean(), y.detach().to(r).std()]).tolist()
    if abs(mean) > far * sd > 0:
        warnings.warn(
            f"`MixedModelHead` got a first batch with y {mean:+.3g} away from what the network gives in the mean, "
            f"{abs(mean) / sd:.1f} standard deviations of y. Until the network has found this by a bias, which takes "
            f"long, the random effects stand in for it, and their variances come out far too large. Before the "
            f"training call `head.start(y, groups)` with all of its rows, or set the offset alone, "
            f"`head.offset = y.mean()`; a `MixedModelRegressor` does so by itself unless `start='current'`.",
            stacklevel=7,
        )


def warn_of_variance(r: Tensor, y: Tensor, variance: float, enough: bool = True) -> None:
    """Warn where y − f varies far more or far less than the variance parameters say, as in a training without a start.

    It counts only where y does so too: what an untrained network gives can vary more than y, and what a trained one
    leaves can vary less, and neither asks for another start.

    Args:
        r: y − f of a batch, shape (m,).
        y: Its response.
        variance: Variance of a row, z'Gz + σ², in the mean of the rows.
        enough: Whether there are levels enough for a small variance to say something.

    Warns:
        UserWarning: The variances of both are far from ``variance``, on the same side.
    """
    if len(r) < ENOUGH_ROWS:
        return
    left, whole = torch.stack([r.detach().var(), y.detach().to(r).var()]).tolist()
    small = enough and 0.0 < max(left, whole) < variance / FAR_OFF
    if small or min(left, whole) > variance * FAR_OFF:
        warnings.warn(
            f"`MixedModelHead` got a first batch in which y less what the network gives has a variance of {left:.3g}, "
            f"and random effects and residual have one of {variance:.3g} together. An optimizer moves the variance "
            f"parameters on a logarithmic scale, by about its learning rate a step: a short training ends far from "
            f"their estimates, and its random effects are wrong. Before the training call `head.start(y, groups)` with "
            f"all of its rows (with y − f for y where the network is trained already); `start='data'` makes a "
            f"`MixedModelRegressor` do so.",
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
