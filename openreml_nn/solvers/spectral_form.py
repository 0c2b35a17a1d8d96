"""V read as a·ZKZ' + b·I: which operand plays which part, and how rows belong to what is reduced."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce as fold

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import (
    CovariancePropagation,
    IdentityMatrix,
    IncidenceMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
)
from openreml_nn.solvers.sources import Source
from openreml_nn.solvers.terms import operands_of


@dataclass(frozen=True)
class Scaled:
    """A fixed matrix, K or for None the identity, that a structure multiplies by one number."""

    K: Tensor | None


def scaled(G: Matrix) -> Scaled | None:
    """The matrix that G is a multiple of at every θ, or None where there is none."""
    if isinstance(G, KnownMatrix):
        return Scaled(G.K)
    if isinstance(G, (ScalarMatrix, IdentityMatrix)):
        return Scaled(None)
    if isinstance(G, SimpleMatrix) and G.shape[0] == G.shape[1]:
        return Scaled(G.values)
    if isinstance(G, KroneckerProduct):
        factors = [scaled(operand) for operand in G.operand_list()]
        large = [factor for factor, operand in zip(factors, G.operand_list(), strict=True) if operand.shape[0] > 1]
        if len(large) <= 1 and None not in factors:
            return large[0] if large else Scaled(None)
    return None


def scale_of(G: Matrix, params: Tensor) -> Tensor:
    """The number by which G multiplies the matrix that ``scaled`` gives."""
    natural = G.trans_params(params)
    variances = [natural[i] for i in _factors(G, range(G.num_params))]
    return fold(torch.mul, variances) if variances else natural.new_ones(())


def _factors(G: Matrix, index: Sequence[int]) -> list[int]:
    """Indices of the thetas whose variances multiply a matrix that ``scaled`` takes; one that does so twice is twice.

    Args:
        G: The matrix.
        index: Indices of its thetas.
    """
    if not isinstance(G, KroneckerProduct):
        return list(index)
    parts = zip(G.operand_list(), G.operand_names, strict=True)
    return [i for operand, name in parts for i in _factors(operand, [index[j] for j in G.operand_index(name)])]


# ---- rows: A = S A₁ S' -----------------------------------------------------------------------------------------------


class LevelRows:
    r"""S = Z D^{-1/2} over the levels with records, D = Z'Z, for rows that belong to one level each: S'S = I."""

    orthonormal = True

    def __init__(self, codes: Tensor, values: Tensor | None, levels: int) -> None:
        known = codes >= 0
        x = known.to(torch.float64) if values is None else torch.where(known, values.to(torch.float64), 0.0)
        places = codes.clamp(min=0)
        self.D = x.new_zeros(levels).index_add(0, places, x.square())
        observed = self.D > 0
        self.size = int(observed.sum())
        self._place = (observed.cumsum(0) - 1).clamp(min=0)[places]
        self._weight = x / torch.where(observed, self.D, 1.0).sqrt()[places]
        self.complete = self.size == len(codes)  # one record of each level: S permutes the rows and changes their signs
        self._row = torch.argsort(self._place) if self.complete else None

    def into(self, v: Tensor) -> Tensor:
        """S'v, shape (size, m)."""
        weighted = self._weight[:, None] * v
        if self._row is not None:
            return weighted[self._row]
        return v.new_zeros((self.size, v.shape[1])).index_add(0, self._place, weighted)

    def out(self, c: Tensor) -> Tensor:
        """S c, shape (n, m)."""
        levels = c if self.size else c.new_zeros((1, c.shape[1]))  # rows of no level have the weight 0 of any
        return self._weight[:, None] * levels[self._place]

    def rest(self, v: Tensor) -> Tensor:
        """v − SS'v, shape (n, m)."""
        return torch.zeros_like(v) if self.complete else v - self.out(self.into(v))


class AllRows:
    """S = I."""

    orthonormal = True
    complete = True

    def __init__(self, n: int) -> None:
        self.size = n

    def into(self, v: Tensor) -> Tensor:
        return v

    def out(self, c: Tensor) -> Tensor:
        return c

    def rest(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class FactorRows:
    """S = W with A₁ = W'W, for A = W W'; nothing is orthonormal, and the rest of v is v."""

    orthonormal = False
    complete = False

    def __init__(self, W: Tensor) -> None:
        self.W, self.size = W, W.shape[1]

    def into(self, v: Tensor) -> Tensor:
        return self.W.mT.to(v) @ v

    def out(self, c: Tensor) -> Tensor:
        return self.W.to(c) @ c

    def rest(self, v: Tensor) -> Tensor:
        return v


Rows = LevelRows | AllRows | FactorRows


# ---- one kernel ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelForm:
    """V = a Z K Z' + b I.

    Attributes:
        name: Name of the term.
        factors: Indices of the thetas whose variances multiply to a, and of those that do to b.
        rows: How the rows belong to what is reduced.
        source: What is reduced.
    """

    name: str
    factors: tuple[list[int], list[int]]
    rows: Rows
    source: Source

    @property
    def variances(self) -> list[int] | None:
        """Indices of the thetas of a and of b, where each is one variance of its own; else None."""
        of_a, of_b = self.factors
        return [*of_a, *of_b] if len(of_a) == len(of_b) == 1 and of_a != of_b else None

    def scales(self, V: Matrix, theta: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[a, b], shape (2,), and their derivatives by θ, shape (2, k), on the host."""
        theta = theta.detach()
        both = torch.stack([V.trans_params(theta), V.trans_grad(theta)])
        natural, slopes = both.to("cpu", torch.float64).numpy()
        scales, J = np.ones(2), np.zeros((2, len(theta)))
        for row, own in enumerate(self.factors):
            scales[row] = natural[own].prod()
            for place, i in enumerate(own):
                J[row, i] += slopes[i] * natural[own[:place] + own[place + 1 :]].prod()
        return scales, J


def kernel_form(V: Matrix) -> KernelForm | str:
    """V as a·ZKZ' + b·I; a sentence that says what is missing where it is not that."""
    operands = operands_of(V, V.theta.detach())
    noise = [i for i, (_, operand, _) in enumerate(operands) if isinstance(operand, (ScalarMatrix, IdentityMatrix))]
    if len(operands) != 2 or len(noise) != 1:
        names = ", ".join(f"{name or 'V'} ({type(operand).__name__})" for name, operand, _ in operands)
        return f"it needs one term Z G Z' and one residual σ²I (a `ScalarMatrix`), got {names}."
    term, Z, G = operands[1 - noise[0]][0], None, operands[1 - noise[0]][1]
    if isinstance(G, CovariancePropagation):
        Z, G = G.Z, G.G
        if Z.num_params:
            return f"it needs a fixed Z, and that of {term!r} has parameters."
    fixed = scaled(G)
    if fixed is None:
        return (
            f"it needs one variance times a known matrix (`KnownMatrix`, `ScalarMatrix`) for {term!r}, "
            f"got a {type(G).__name__} with the parameters {G.param_names}."
        )

    rows, source = _rows_of(Z, fixed.K, V.shape[0])
    assert isinstance(V, Sum)
    factors = _factors(G, V.operand_index(term)), V.operand_index(operands[noise[0]][0])
    return KernelForm(term, factors, rows, source)


def _rows_of(Z: Matrix | None, K: Tensor | None, n: int) -> tuple[Rows, Source]:
    """How rows belong to levels, and what is to be reduced."""
    if Z is None:
        ones = torch.ones(n, dtype=torch.float64, device=None if K is None else K.device)
        return AllRows(n), Source("kernel", (K, ones))
    if isinstance(Z, IncidenceMatrix) and len(Z.effects) == 1:
        rows = LevelRows(Z.codes, None if Z.values is None else Z.values[:, 0], Z.num_levels)
        return rows, Source("kernel", (K, rows.D))
    W = Z.values if isinstance(Z, SimpleMatrix) else Z.build(Z.theta.detach())
    if K is not None:
        return AllRows(n), Source("sandwich", (W.to(torch.float64), K))
    if W.shape[1] < n:
        return FactorRows(W), Source("inner", (W,))
    return AllRows(n), Source("outer", (W,))
