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
from openreml_nn.solvers.reductions import Source
from openreml_nn.solvers.spectral_form import FromParams, scaled
from openreml_nn.solvers.terms import operands_of


@dataclass(frozen=True)
class TraitForm:
    """V = Σ_g ⊗ K + Σ_e ⊗ I, rows in any order.

    Attributes:
        sigma_g: Σ_g from V's θ, shape (t, t).
        sigma_e: Σ_e from V's θ, shape (t, t).
        order: The row of each individual (slower) and trait, shape (individuals · t,).
        traits: t.
        source: The kernel over the individuals with records.
    """

    sigma_g: FromParams
    sigma_e: FromParams
    order: Tensor
    traits: int
    source: Source


@dataclass(frozen=True)
class _Grid:
    """A term Σ ⊗ K: Σ from its parameters, K, and trait and level of each row."""

    sigma: FromParams
    K: Tensor | None
    trait: Tensor
    level: Tensor
    traits: int
    levels: int


def trait_form(V: Matrix) -> TraitForm | str:
    """V as Σ_g ⊗ K + Σ_e ⊗ I; a sentence that says what is missing where it is not that."""
    operands = operands_of(V, V.theta.detach())
    grids = [_grid(operand) for _, operand, _ in operands]
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
        sigma_e = other.sigma
    else:
        found = _residual_sigma(operands[r][1], grid)
        if isinstance(found, str):
            return f"it needs a residual Σ_e ⊗ I. {operands[r][0]}: {found}"
        sigma_e = found
    cells = torch.bincount(grid.level * grid.traits + grid.trait, minlength=grid.levels * grid.traits)
    cells = cells.reshape(grid.levels, grid.traits)
    observed = cells.any(1)
    if not bool((cells[observed] == 1).all()):
        return (
            f"it needs each individual to have each of {grid.traits} traits once, got {len(grid.level)} rows of "
            f"{int(observed.sum())} individuals."
        )
    return TraitForm(
        sigma_g=lambda theta: grid.sigma(operands_of(V, theta)[g][2]),
        sigma_e=lambda theta: sigma_e(operands_of(V, theta)[r][2]),
        order=torch.argsort(grid.level * grid.traits + grid.trait),
        traits=grid.traits,
        source=Source("kernel", (grid.K, observed.to(torch.float64))),
    )


def _kernel_of(grid: "_Grid | str") -> Tensor | None:
    return grid.K if isinstance(grid, _Grid) else None


def _grid(operand: Matrix) -> "_Grid | str":
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
    columns = _columns(Z, G.shape[0])
    if columns is None:
        return "each of its rows must have one effect of one level."
    fast = place != 0  # the kernel's index runs fastest
    traits = G.shape[0] // levels

    def sigma(params: Tensor) -> Tensor:
        own = G.split(params if Z is None else operand.split(params)[1])  # type: ignore[operator]
        parts = [a.build(p) for i, (a, p) in enumerate(zip(matrices, own, strict=True)) if i != place]
        return kernel.scale(own[place]) * fold(torch.kron, parts)

    trait = columns // levels if fast else columns % traits
    level = columns % levels if fast else columns // traits
    return _Grid(sigma, kernel.K, trait, level, traits, levels)


def _columns(Z: Matrix | None, size: int) -> Tensor | None:
    """The column of Z that holds the 1 of each row; None where there is no such column in each row."""
    if Z is None:
        return torch.arange(size)
    if not isinstance(Z, IncidenceMatrix) or bool((Z.codes < 0).any()):
        return None
    if isinstance(Z, CellMatrix):
        return Z.cells * len(Z.levels) + Z.codes
    if Z.values is None:
        return Z.codes
    one_hot = bool(((Z.values == 1.0) | (Z.values == 0.0)).all()) and bool((Z.values.sum(1) == 1.0).all())
    return Z.values.argmax(1) * len(Z.levels) + Z.codes if isinstance(Z, KhatriRaoMatrix) and one_hot else None


def _one_to_one(left: _Grid, right: _Grid) -> bool:
    """Whether rows of one individual in one are rows of one individual in the other."""
    pairs = torch.unique(left.level * right.levels + right.level)
    return len(pairs) == len(torch.unique(left.level)) == len(torch.unique(right.level))


def _residual_sigma(residual: Matrix, grid: _Grid) -> FromParams | str:
    """Σ_e of a residual that is diagonal: σ² I, or a variance for each trait."""
    eye = torch.eye(grid.traits, dtype=torch.float64, device=grid.trait.device)
    if isinstance(residual, (ScalarMatrix, IdentityMatrix)):
        return lambda params: residual.diagonal(params)[0] * eye.to(params)
    if isinstance(residual, DiagonalPropagation):
        D = residual.operand_list()[0]
        X = residual.X
        trait = X.argmax(1)
        if X.shape[1] == grid.traits and torch.equal(X, torch.nn.functional.one_hot(trait, X.shape[1]).to(X)):
            if torch.equal(trait, grid.trait):
                return lambda params: torch.diag(D.diagonal(residual.split(params)[0]))
            return "the traits of its rows are in another order than those of the kernel's term."
    return f"a {type(residual).__name__} is none."
