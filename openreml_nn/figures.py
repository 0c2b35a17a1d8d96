"""Figures of a fit: heat maps of covariances and correlations, caterpillar plots of random effects.

Figures are made without pyplot, so that drawing one neither needs a display nor leaves anything open.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from openreml_nn.covariance import CovariancePropagation, IncidenceMatrix
from openreml_nn.result import FitResult
from openreml_nn.solvers.terms import operands_of

LABELLED = 40  # rows up to which each is labelled
NUMBERED = 8  # rows up to which each cell shows its number
NORMAL_95 = 1.96  # half width of a 95 % interval, in standard deviations


class TermCovariance(NamedTuple):
    """A covariance to show.

    Attributes:
        name: Name of the term.
        labels: One for each row.
        values: The matrix.
        note: What is shown of G where it is not the whole.
    """

    name: str
    labels: list[str]
    values: np.ndarray
    note: str


def term_covariances(result: FitResult, most: int = 200) -> Iterator[TermCovariance]:
    """The covariance G of each term Z G Z' of V, the residual included.

    Where the levels of a term are independent and alike, it is the covariance of the effects of one level.

    Args:
        result: A fit.
        most: Largest number of rows; of a larger G the first ones are given.
    """
    for name, operand, own in operands_of(result.V, result.theta):
        if not isinstance(operand, CovariancePropagation):
            continue
        G, params, q = operand.G, operand.split(own)[1], operand.G.shape[0]
        effects, levels = ["Intercept"], [str(i) for i in range(q)]
        if isinstance(operand.Z, IncidenceMatrix):
            effects, levels = operand.Z.effects, operand.Z.levels
        with torch.no_grad():
            block = G.common_block(params, len(levels)) if len(effects) > 1 else None
            if block is not None:
                yield TermCovariance(name or "G", list(effects), block.cpu().numpy(), "effects of one level")
                continue
            first = torch.arange(min(q, most), device=params.device)
            values = G.submatrix(params, first, first).cpu().numpy()
        labels = levels if len(effects) == 1 else [f"{effect} {level}" for effect in effects for level in levels]
        yield TermCovariance(name or "G", labels[:most], values, f"first {most} of {q} rows" if q > most else "")


def correlation(values: np.ndarray) -> np.ndarray:
    """Correlation matrix of a covariance matrix; zero beside a variance of zero, ones on the diagonal."""
    sd = np.sqrt(np.clip(np.diag(values), 0.0, None))
    scale = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    C = values * np.outer(scale, scale)
    np.fill_diagonal(C, 1.0)
    return C


def heat_map(values: np.ndarray, labels: Sequence[str], title: str = "", limit: float | None = None) -> Figure:
    """A symmetric matrix as a picture, blue below zero and red above.

    Args:
        values: The matrix, shape (q, q).
        labels: One for each row.
        title: Title.
        limit: Value of the darkest colour; the largest absolute value when left out, 1 for a correlation.
    """
    q = len(values)
    side = 4.5 if q <= NUMBERED else 6.0 if q <= LABELLED else 7.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    limit = limit or float(np.abs(values).max()) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_title(title)
    if q <= LABELLED:
        axes.set_xticks(range(q), labels, rotation=90)
        axes.set_yticks(range(q), labels)
        axes.tick_params(labelsize=9 if q <= NUMBERED else 7, length=0)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if q <= NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=9)
    return figure


def caterpillar(blup: pd.DataFrame, title: str = "", most: int = 60) -> Figure:
    r"""BLUPs in order, with intervals û ± 1.96 √PEV, one panel for each effect.

    Args:
        blup: Rows of `FitResult.blup` of one term: effect, level, blup, pev.
        title: Title.
        most: Largest number of levels in a panel; of more, the lowest and the highest are shown.
    """
    effects = list(dict.fromkeys(blup["effect"]))
    panels = {effect: _ends(blup[blup["effect"] == effect].sort_values("blup"), most) for effect in effects}
    rows = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(1.2 + 4.0 * len(effects), 1.5 + 0.16 * rows), layout="constrained")
    figure.suptitle(title)
    for axes, (effect, panel) in zip(figure.subplots(1, len(effects), squeeze=False)[0], panels.items(), strict=True):
        at = np.arange(len(panel))
        half = NORMAL_95 * np.sqrt(panel["pev"].clip(lower=0.0))
        axes.errorbar(panel["blup"], at, xerr=half, fmt="o", markersize=3, linewidth=1, color="tab:blue")
        axes.axvline(0.0, color="grey", linewidth=0.8)
        axes.set_yticks(at, panel["level"], fontsize=7)
        axes.set_ylim(-1, len(panel))
        axes.set_xlabel(effect if len(panel) == (blup["effect"] == effect).sum() else f"{effect} (lowest, highest)")
    return figure


def picture(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as pixels, shape (height, width, 3), values 0 to 255."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: Any = canvas.buffer_rgba()
    return np.asarray(pixels)[:, :, :3].copy()


def _ends(panel: pd.DataFrame, most: int) -> pd.DataFrame:
    if len(panel) <= most:
        return panel
    return pd.concat([panel.head(most // 2), panel.tail(most - most // 2)])
