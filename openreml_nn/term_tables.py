"""What a result says by term of V: shares of the variance, and predictions of the random effects."""

import math
from collections import defaultdict

import numpy as np
import pandas as pd

from openreml_nn import likelihood
from openreml_nn.covariance import Sum
from openreml_nn.covariance.structures import IncidenceMatrix
from openreml_nn.solvers import Evaluation, RandomTerm, random_terms

BLUP_COLUMNS = ("term", "effect", "level", "blup", "pev")


class TermTables:
    """Shares and predictions by term, each made when it is first asked for, and kept.

    Where several processes share the rows, they make them together; one may read alone what is there.

    Args:
        evaluation: The problem evaluated at the estimates.

    Attributes:
        terms: The random terms.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.terms = random_terms(evaluation.problem.V, evaluation.theta.detach())
        self._shares: list[float] | None = None
        self._blups: dict[str, pd.DataFrame] = {}

    def fill(self) -> None:
        """Make all that is not there yet."""
        self.shares()
        for term in self.terms:
            self.blup(term)

    def shares(self) -> list[float]:
        """Each term's share of the mean of the diagonal of V, in the row of its first natural parameter; else NaN.

        A term whose parameters are all those of another one counts to that.
        """
        if self._shares is None:
            self._shares = _shares(self.evaluation)
        return self._shares

    def blup(self, term: RandomTerm) -> pd.DataFrame:
        """Predictions of a term: term, effect, level, blup, pev; on the first process of all its levels."""
        if term.name not in self._blups:
            self._blups[term.name] = self._of_all_levels(term)
        return self._blups[term.name]

    def _of_all_levels(self, term: RandomTerm) -> pd.DataFrame:
        table, ranks = _blups(self.evaluation, term), self.evaluation.problem.ranks
        if ranks.size == 1 or term.name not in ranks.own:
            return table
        parts = ranks.to_first((table, ranks.own[term.name]))
        return _joined(parts) if parts else table


def _shares(evaluation: Evaluation) -> list[float]:
    V, problem = evaluation.problem.V, evaluation.problem
    rows = [(path[:1], index) for path, leaf, index in V.leaves() for _ in leaf.natural_names]
    if not isinstance(V, Sum):
        return [math.nan if row else 1.0 for row in range(len(rows))]
    sizes = [float(problem.mean_diagonal(term, own)) for term, own in V.parts(evaluation.theta.detach())]
    share: defaultdict[int, float] = defaultdict(float)
    for name, size in zip(V.operand_names, sizes, strict=True):
        thetas = set(V.operand_index(name))
        own = [row for row, (path, _) in enumerate(rows) if path == (name,)]
        tied = [row for row, (_, index) in enumerate(rows) if not thetas.isdisjoint(index)]
        for row in (own or tied)[:1]:
            share[row] += size / sum(sizes)
    return [share.get(row, math.nan) for row in range(len(rows))]


def _blups(evaluation: Evaluation, term: RandomTerm) -> pd.DataFrame:
    """Predictions of the levels that this process has."""
    effects, levels = ["Intercept"], [str(i) for i in range(term.G.shape[0])]
    if isinstance(term.Z, IncidenceMatrix):
        effects, levels = term.Z.effects, term.Z.levels
    return pd.DataFrame(
        {
            "term": term.name,
            "effect": np.repeat(effects, len(levels)),
            "level": np.tile(levels, len(effects)),
            "blup": likelihood.blup(evaluation, term).cpu().numpy(),
            "pev": likelihood.prediction_error_variance(evaluation, term).cpu().numpy(),
        }
    )


def _joined(parts: list[tuple[pd.DataFrame, np.ndarray | None]]) -> pd.DataFrame:
    """The tables of a term from all processes as one, its levels in their order."""
    sizes = [len(table) // max(table["effect"].nunique(), 1) for table, _ in parts]
    effects, places, offset = [], [], 0
    for (table, place), size in zip(parts, sizes, strict=True):
        count = len(table) // max(size, 1)
        effects.append(np.repeat(np.arange(count), size))
        places.append(np.tile(np.arange(offset, offset + size) if place is None else place, count))
        offset += size
    order = np.lexsort((np.concatenate(places), np.concatenate(effects)))
    return pd.concat([table for table, _ in parts], ignore_index=True).iloc[order].reset_index(drop=True)
