"""V taken apart: its random terms Z G Z' and what is left, the residual. Solvers and predictions start from this."""

from dataclasses import dataclass

from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, Matrix, Sum

RESIDUAL = "residual"  # an operand of V with this name is no random term


@dataclass(frozen=True)
class RandomTerm:
    """One term Z G Z' of V at given thetas.

    Attributes:
        name: Name of the operand of V.
        Z: Design, shape (n, q).
        G: Covariance of the effects, shape (q, q).
        Z_params: Raw parameters of Z.
        G_params: Raw parameters of G.
    """

    name: str
    Z: Matrix
    G: Matrix
    Z_params: Tensor
    G_params: Tensor


def operands_of(V: Matrix, theta: Tensor) -> list[tuple[str, Matrix, Tensor]]:
    """Name, matrix and parameters of each operand of a `Sum`; of V itself, without a name, otherwise."""
    if not isinstance(V, Sum):
        return [("", V, theta)]
    return [(name, *part) for name, part in zip(V.operand_names, V.parts(theta), strict=True)]


def propagated_terms(V: Matrix, theta: Tensor) -> list[RandomTerm]:
    """Every Z G Z' of V, a `Sum` or a single term, whatever its name."""
    terms = []
    for name, operand, own in operands_of(V, theta):
        if isinstance(operand, CovariancePropagation):
            (Z, z), (G, g) = operand.parts(own)
            terms.append(RandomTerm(name, Z, G, z, g))
    return terms


def random_terms(V: Matrix, theta: Tensor) -> list[RandomTerm]:
    """The terms Z G Z' of V but for the operand named ``residual``."""
    return [term for term in propagated_terms(V, theta) if term.name != RESIDUAL]
