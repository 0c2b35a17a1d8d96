"""Which operand of V plays which part in the mixed-model equations."""

from dataclasses import dataclass

from torch import Tensor

from openreml_nn.covariance import DiagonalPropagation, Matrix, ScalarMatrix
from openreml_nn.covariance.structures import IncidenceMatrix
from openreml_nn.solvers.ranks import ALONE, Ranks
from openreml_nn.solvers.terms import operands_of, propagated_terms


def is_scaled_diagonal(operand: Matrix) -> bool:
    """Whether an operand is σ² times a known diagonal."""
    if isinstance(operand, DiagonalPropagation):
        return operand.X.shape[1] == 1
    return isinstance(operand, ScalarMatrix)


def _is_by_level(G: Matrix, params: Tensor, levels: int) -> bool:
    """Whether effects of different levels are uncorrelated."""
    return G.common_block(params, levels) is not None or G.level_blocks(params, levels) is not None


@dataclass(frozen=True)
class Plan:
    """Which operand of V plays which part.

    Attributes:
        residual: Index of the residual among the operands.
        first: Design of the term that is eliminated level by level, or None.
        first_index: Its index among the random terms; −1 for None.
        rest_index: Indices of the other random terms.
        rest: Their designs.
        sparse: Whether their effects are all independent, so that what is kept of them need not be dense.
    """

    residual: int
    first: IncidenceMatrix | None
    first_index: int
    rest_index: list[int]
    rest: list[Matrix]
    sparse: bool

    @property
    def size_of_rest(self) -> int:
        """Columns of the other terms."""
        return sum(Z.shape[1] for Z in self.rest)

    @classmethod
    def of(cls, V: Matrix, ranks: Ranks = ALONE) -> "Plan":
        """The plan of a V: the term with the most effects among those correlated only within a level comes first.

        Where each of several processes has levels of its own of a term, that one does.
        """
        theta = V.theta.detach()
        operands = operands_of(V, theta)
        residual = next(i for i, (_, operand, _) in enumerate(operands) if is_scaled_diagonal(operand))
        terms = propagated_terms(V, theta)
        able = [i for i, term in enumerate(terms) if isinstance(term.Z, IncidenceMatrix)
                and _is_by_level(term.G, term.G_params, term.Z.num_levels)]  # fmt: skip
        own = [i for i, term in enumerate(terms) if term.name in ranks.own]
        if len(own) > 1 or not set(own) <= set(able):
            names = " and ".join(repr(terms[i].name) for i in own)
            raise ValueError(
                f"The mixed-model equations take levels of their own on each process of one term with independent "
                f"levels, got {names}. Give V all levels of the others on every process."
            )
        best = max(own or able, key=lambda i: terms[i].Z.shape[1], default=-1)
        rest = [i for i in range(len(terms)) if i != best]
        first = terms[best].Z if best >= 0 else None
        assert first is None or isinstance(first, IncidenceMatrix)
        sparse = all(terms[i].G.is_diagonal for i in rest)
        return cls(residual, first, best, rest, [terms[i].Z for i in rest], sparse)
