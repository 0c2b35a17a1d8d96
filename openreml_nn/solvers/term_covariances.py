r"""σ² and the covariances G of the terms as functions of θ, with derivatives of what is small.

Where all levels of a term share one block S, G = S ⊗ I, G and its derivatives are those of a few numbers, however many
effects there are. These numbers, σ² before all, are put into one vector z(θ) whose Jacobian J is made once for a θ; it
serves the score, ∂ℓ/∂z' J, as well as the working variates. Where z holds variances, as with random intercepts, z and J
are the transforms of θ and their derivatives. What is not shared is differentiated as it is.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, DiagonalPropagation, Matrix, ScalarMatrix, Sum
from openreml_nn.covariance.structures import IncidenceMatrix
from openreml_nn.solvers.base import along_free, derivatives_along
from openreml_nn.solvers.terms import RandomTerm, operands_of, propagated_terms


@dataclass(frozen=True)
class BlockForm:
    """What G of a term is at every θ.

    Attributes:
        levels: Number of levels: of the factor of Z, or of the effects where Z is no factor.
        effects: Effects of each level, s.
        shared: Whether all levels share one block.
        diagonal: Whether G is diagonal.
    """

    levels: int
    effects: int
    shared: bool
    diagonal: bool

    @classmethod
    def of(cls, term: RandomTerm) -> "BlockForm":
        levels = term.Z.num_levels if isinstance(term.Z, IncidenceMatrix) else term.G.shape[0]
        shared = term.G.common_block(term.G_params, levels) is not None
        return cls(levels, term.G.shape[0] // levels, shared, term.G.is_diagonal)

    def spread(self, block: Tensor) -> Tensor:
        """G = ``block`` ⊗ I: its diagonal, shape (q,), where it is diagonal, else all of it."""
        if self.diagonal:
            return block.diagonal().repeat_interleave(self.levels) if self.effects > 1 else block[0].expand(self.levels)
        return torch.kron(block, torch.eye(self.levels, dtype=block.dtype, device=block.device))

    def gathered(self, gradient: Tensor) -> Tensor:
        """The gradient by the block, shape (s, s), from one by what ``spread`` gives."""
        by_level = gradient.view(*(self.effects, self.levels) * gradient.ndim)
        if self.diagonal:
            return torch.diag(by_level.sum(1))
        return by_level.diagonal(dim1=1, dim2=3).sum(2)


class TermCovariances:
    """σ² and G of each term of V, in the order of V.

    Args:
        V: Covariance of the observations.
        residual: Index of σ²R₀ among its operands.
        first: Index among the terms of the one that is eliminated level by level; −1 for none.
    """

    def __init__(self, V: Matrix, residual: int, first: int) -> None:
        self.V, self.residual, self.first = V, residual, first
        self.forms = [BlockForm.of(term) for term in propagated_terms(V, V.theta.detach())]
        self.by_theta = all(form.shared for form in self.forms) and len([*V.parameters()]) == V.num_params
        self.index = (
            [V.operand_index(name) for name in V.operand_names] if isinstance(V, Sum) else [[*range(V.num_params)]]
        )
        self.owned = self._owned()
        self.variances = self._variances()

    def _pieces(self) -> list[tuple[list[int], int]]:
        """Thetas of each piece of z, and the rows of its block: σ², then the shared blocks."""
        operands = [operand for _, operand, _ in operands_of(self.V, self.V.theta.detach())]
        terms = [i for i, operand in enumerate(operands) if isinstance(operand, CovariancePropagation)]
        shared = [(self.index[i], form.effects) for i, form in zip(terms, self.forms, strict=True) if form.shared]
        return [(self.index[self.residual], 1), *shared]

    def _owned(self) -> Tensor:
        """Ones where an element of z depends on a theta, shape (m, number of thetas)."""
        every = torch.eye(self.V.num_params, dtype=torch.float64, device=self.V.theta.device)
        return torch.cat([every[index].sum(0).expand(s * s, -1) for index, s in self._pieces()])

    @cached_property
    def _seeds(self) -> tuple[Tensor, Tensor]:
        """Which elements of z are differentiated at once: those of the lower triangles that have no theta in common.

        Returns:
            (ones where an element of z is in a seed, shape (c, m); the seed of each element, shape (m,)).
        """
        tied = sum(len(own) for own in self.index) > self.V.num_params  # a theta is part of several terms
        seed, lower, begin = [], [], 0
        for _, s in self._pieces():
            row, column = (place.flatten() for place in torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij"))
            seed.append(begin + row * (row + 1) // 2 + column)
            seed[-1][column > row] = seed[-1].view(s, s).mT.flatten()[column > row]
            lower.append(column <= row)
            begin += s * (s + 1) // 2 if tied else 0
        places, used = torch.cat(seed), torch.cat(lower)
        seeds = torch.zeros(int(places.max()) + 1, len(places))
        seeds[places[used], used.nonzero()[:, 0]] = 1.0
        return seeds.to(self.owned), places.to(self.owned.device)

    def _variances(self) -> Tensor | None:
        """The theta of each element of z where each is the variance of a `ScalarMatrix`, shape (m,); else None."""
        theta = self.V.theta.detach()
        residual = operands_of(self.V, theta)[self.residual][1]
        found = [residual.operand_list()[0] if isinstance(residual, DiagonalPropagation) else residual]
        found += [term.G for term in propagated_terms(self.V, theta)]
        return self.owned.argmax(1) if all(isinstance(G, ScalarMatrix) for G in found) else None

    def sigma2(self, theta: Tensor) -> Tensor:
        """σ², the factor of R₀."""
        _, residual, own = operands_of(self.V, theta)[self.residual]
        if isinstance(residual, DiagonalPropagation):
            ((residual, own),) = residual.parts(own)
        return residual.mean_diagonal(own)

    def small(self, theta: Tensor) -> Tensor:
        """z: σ² and the shared blocks, row by row, shape (m,)."""
        parts = [self.sigma2(theta)[None]]
        for term, form in zip(propagated_terms(self.V, theta), self.forms, strict=True):
            if form.shared:
                block = term.G.common_block(term.G_params, form.levels)
                assert block is not None
                parts.append(block.reshape(-1))
        return torch.cat(parts)

    def large(self, theta: Tensor) -> list[Tensor]:
        """G of the other terms: blocks by level, shape (s, s, L), of the first, else the diagonal or all of it."""
        found = []
        for i, (term, form) in enumerate(zip(propagated_terms(self.V, theta), self.forms, strict=True)):
            if form.shared:
                continue
            if i == self.first:
                blocks = term.G.level_blocks(term.G_params, form.levels)
                assert blocks is not None
                found.append(blocks.permute(1, 2, 0))
            else:
                found.append(term.G.diagonal(term.G_params) if form.diagonal else term.G.build(term.G_params))
        return found

    def blocks(self, z: Tensor) -> list[Tensor | None]:
        """The shared block of each term, shape (s, s); None where there is none. A row of z for each leading index."""
        found: list[Tensor | None] = []
        at = 1
        for form in self.forms:
            s = form.effects
            found.append(z[at : at + s * s].view(s, s, *z.shape[1:]) if form.shared else None)
            at += s * s if form.shared else 0
        return found

    def arranged(self, z: Tensor, large: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the equations take: σ²; S by level, shape (s, s, L) or (s, s, 1), and the other G, in units of σ²."""
        others, rest, first = iter(large), [], z.new_zeros((1, 1, 1))
        for i, (form, block) in enumerate(zip(self.forms, self.blocks(z / z[0]), strict=True)):
            if i == self.first:
                first = next(others) / z[0] if block is None else block[..., None]
            else:
                rest.append(next(others) / z[0] if block is None else form.spread(block))
        return z[0], first, rest

    def gradients(
        self, total: Tensor, first: Tensor, rest: list[Tensor], z: Tensor, large: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients by z and by what is large from those by what ``arranged`` gives, along V and by covariances."""
        parts, of_large, others = [total[None]], [], iter(rest)
        for i, form in enumerate(self.forms):
            own = first if i == self.first else next(others)
            if not form.shared:
                of_large.append(own)
            else:
                parts.append((own if i == self.first else form.gathered(own)).reshape(-1))
        of_z = torch.cat(parts)
        explained = of_z[1:] @ z[1:] + sum((g * G).sum() for g, G in zip(of_large, large, strict=True))
        of_z[0] = (total - explained) / z[0]
        return of_z, of_large

    def differentiated(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z, shape (m,), and its Jacobian J by θ, shape (m, number of thetas)."""
        if self.variances is not None:
            theta = theta.detach()
            return self.V.trans_params(theta)[self.variances], self.owned * self.V.trans_grad(theta)
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            z = self.small(theta)
        seeds, places = self._seeds
        rows = derivatives_along(z, theta, seeds)
        return z.detach(), (rows[places] if len(rows) > 1 else rows) * self.owned

    def moved(self, b: list[Tensor], z: Tensor, J: Tensor, relative: Tensor, theta: Tensor) -> list[Tensor]:
        """(Ġ_k − (σ̇²/σ²) G) b of each term for each free theta, shape (k, q), for b of shape (q,).

        Args:
            b: Effects of each term.
            z: σ² and the shared blocks, shape (m,).
            J: Columns of their Jacobian for the free thetas, shape (m, k).
            relative: σ̇²/σ², shape (1, k).
            theta: θ.
        """
        large = [i for i, form in enumerate(self.forms) if not form.shared]

        def scaled(at: Tensor) -> Tensor:
            terms = propagated_terms(self.V, at)
            return torch.cat([terms[i].G.matmul(terms[i].G_params, b[i][:, None])[:, 0] for i in large])

        if large:
            product = along_free(self.V, theta, scaled).mT - relative.mT * scaled(theta)
            of_large = iter(product.split([len(b[i]) for i in large], dim=1))
        rows = []
        for form, block, own in zip(self.forms, self.blocks(J - z[:, None] * relative), b, strict=True):
            if block is None:
                rows.append(next(of_large))
            else:
                factors = block.permute(2, 0, 1).reshape(-1, form.effects)
                rows.append((factors @ own.view(form.effects, -1)).view(-1, len(own)))
        return rows
