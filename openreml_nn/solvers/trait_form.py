"""V read as Σ_g ⊗ K + Σ_e ⊗ I: which operand plays which part, and which individual and trait each row is."""

from dataclasses import dataclass
from functools import reduce as fold

import torch
from torch import Tensor

from openreml_nn.covariance import (
    CellMatrix,
    CovariancePropagation,
    DiagonalPropagation,
    IdentityMatrix,
    IncidenceMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
)
from openreml_nn.solvers.sources import Source
from openreml_nn.solvers.spectral_form import scale_of, scaled
from openreml_nn.solvers.terms import operands_of

SOME_ROWS = 64  # rows that are looked at before all are


@dataclass(frozen=True)
class KroneckerSigma:
    """Σ of the operand Σ ⊗ K of V with this index, K the factor at ``place``."""

    index: int
    place: int

    def of(self, V: Matrix, theta: Tensor) -> Tensor:
        """Σ at V's θ, shape (t, t); what scales K scales Σ."""
        _, G, own = operands_of(V, theta)[self.index]
        if isinstance(G, CovariancePropagation):
            _, (G, own) = G.parts(own)
        assert isinstance(G, KroneckerProduct)
        parts = G.parts(own)
        scale = scale_of(*parts.pop(self.place))
        return scale * fold(torch.kron, [matrix.build(params) for matrix, params in parts])


@dataclass(frozen=True)
class DiagonalSigma:
    """Σ of a residual that is diagonal: σ² I, or a variance for each trait."""

    index: int
    traits: int

    def of(self, V: Matrix, theta: Tensor) -> Tensor:
        """Σ at V's θ, shape (t, t)."""
        _, residual, own = operands_of(V, theta)[self.index]
        if isinstance(residual, DiagonalPropagation):
            ((D, own),) = residual.parts(own)
            return torch.diag(D.diagonal(own))
        return torch.diag(residual.diagonal(own)[:1].expand(self.traits))


@dataclass(frozen=True)
class TraitForm:
    """V = Σ_g ⊗ K + Σ_e ⊗ I, rows in any order.

    Attributes:
        sigma_g: Where Σ_g is.
        sigma_e: Where Σ_e is.
        order: The row of each individual (slower) and trait, shape (individuals · t,).
        traits: t.
        source: The kernel over the individuals with records.
    """

    sigma_g: KroneckerSigma
    sigma_e: KroneckerSigma | DiagonalSigma
    order: Tensor
    traits: int
    source: Source


@dataclass(frozen=True)
class _Grid:
    """A term Σ ⊗ K: where Σ is, K, and trait and level of each row."""

    sigma: KroneckerSigma
    K: Tensor | None
    trait: Tensor
    level: Tensor
    traits: int
    levels: int


def trait_form(V: Matrix) -> TraitForm | str:
    """V as Σ_g ⊗ K + Σ_e ⊗ I; a sentence that says what is missing where it is not that."""
    operands = operands_of(V, V.theta.detach())
    grids = [_grid(i, operand, V.theta.device) for i, (_, operand, _) in enumerate(operands)]
    kernels = [i for i, g in enumerate(grids) if isinstance(g, _Grid)]
    if len(operands) != 2 or not kernels:
        reasons = [f"{n or 'V'}: {g}" for (n, _, _), g in zip(operands, grids, strict=True) if isinstance(g, str)]
        return f"it needs two operands, Z (Σ_g ⊗ K) Z' and a residual Σ_e ⊗ I. {' '.join(reasons)}".rstrip()
    g = next((i for i in kernels if _kernel_of(grids[i]) is not None), kernels[0])
    r = 1 - g
    grid, other = grids[g], grids[r]
    assert isinstance(grid, _Grid)
    if isinstance(other, _Grid):
        if other.K is not None:
            return "it needs one of the two operands to be Σ ⊗ I, and both have a known matrix."
        if other.traits != grid.traits or not torch.equal(other.trait, grid.trait):
            return "it needs the same traits, in the same order, in both operands."
        if not _one_to_one(grid, other):
            return "it needs the same individuals in both operands."
    else:
        reason = _no_residual(operands[r][1], grid)
        if reason is not None:
            return f"it needs a residual Σ_e ⊗ I. {operands[r][0]}: {reason}"
    cells = torch.bincount(grid.level * grid.traits + grid.trait, minlength=grid.levels * grid.traits)
    cells = cells.reshape(grid.levels, grid.traits)
    observed = cells.any(1)
    if not bool((cells[observed] == 1).all()):
        return (
            f"it needs each individual to have each of {grid.traits} traits once, got {len(grid.level)} rows of "
            f"{int(observed.sum())} individuals."
        )
    return TraitForm(
        sigma_g=grid.sigma,
        sigma_e=other.sigma if isinstance(other, _Grid) else DiagonalSigma(r, grid.traits),
        order=torch.argsort(grid.level * grid.traits + grid.trait),
        traits=grid.traits,
        source=Source("kernel", (grid.K, observed.to(torch.float64))),
    )


def _kernel_of(grid: "_Grid | str") -> Tensor | None:
    return grid.K if isinstance(grid, _Grid) else None


def _grid(index: int, operand: Matrix, device: torch.device) -> "_Grid | str":
    """A term Σ ⊗ K over its rows; why it is none otherwise."""
    Z, G = (operand.Z, operand.G) if isinstance(operand, CovariancePropagation) else (None, operand)
    if not isinstance(G, KroneckerProduct):
        return f"a {type(G).__name__} is no `KroneckerProduct`."
    matrices = G.operand_list()
    fixed = [scaled(matrix) for matrix in matrices]
    place = next((i for i in (len(matrices) - 1, 0) if fixed[i] is not None), None)
    if place is None or len(matrices) < 2 or any(a.shape[0] != a.shape[1] for a in matrices):
        return "its first or last factor must be a known matrix."
    kernel, levels = fixed[place], matrices[place].shape[0]
    assert kernel is not None
    columns = torch.arange(G.shape[0], device=device) if Z is None else _columns(Z)
    if columns is None:
        return "each of its rows must have one effect of one level."
    fast = place != 0  # the kernel's index runs fastest
    traits = G.shape[0] // levels
    trait = columns // levels if fast else columns % traits
    level = columns % levels if fast else columns // traits
    return _Grid(KroneckerSigma(index, place), kernel.K, trait, level, traits, levels)


def _columns(Z: Matrix) -> Tensor | None:
    """The column of Z that holds the 1 of each row; None where there is no such column in each row."""
    if not isinstance(Z, IncidenceMatrix) or bool((Z.codes < 0).any()):
        return None
    if isinstance(Z, CellMatrix):
        return Z.cells * Z.num_levels + Z.codes
    if Z.values is None:
        return Z.codes
    one_hot = isinstance(Z, KhatriRaoMatrix) and all(map(_one_in_each_row, (Z.values[:SOME_ROWS], Z.values)))
    return Z.values.argmax(1) * Z.num_levels + Z.codes if one_hot else None


def _one_in_each_row(x: Tensor) -> bool:
    """Whether each row has a single 1 and else zeros."""
    return bool(((x == 1.0) | (x == 0.0)).all()) and bool((x.sum(1) == 1.0).all())


def _one_to_one(left: _Grid, right: _Grid) -> bool:
    """Whether rows of one individual in one are rows of one individual in the other."""
    pairs = torch.unique(left.level * right.levels + right.level)
    return len(pairs) == len(torch.unique(left.level)) == len(torch.unique(right.level))


def _no_residual(residual: Matrix, grid: _Grid) -> str | None:
    """Why a residual is no diagonal Σ_e ⊗ I: one variance, or one for each trait; None where it is."""
    if isinstance(residual, (ScalarMatrix, IdentityMatrix)):
        return None
    if isinstance(residual, DiagonalPropagation):
        X = residual.X
        trait = X.argmax(1)
        if X.shape[1] == grid.traits and torch.equal(X, torch.nn.functional.one_hot(trait, X.shape[1]).to(X)):
            same = torch.equal(trait, grid.trait)
            return None if same else "the traits of its rows are in another order than those of the kernel's term."
    return f"a {type(residual).__name__} is none."
