r"""What predictions need of the training rows: effects given the data, their covariance, and nothing of the rows.

With u₁ the effects that are eliminated level by level, u_T the rest, and in units of σ² the K_l, C_l and Φ of the
mixed-model equations (see `solvers.henderson`), the effects have given the data the covariance

    var(u_T) = σ²Φ,   u₁ = −K_l C_l u_T + error of variance σ²K_l,

so that z₁'u₁ + z_T'u_T of a row has the variance σ²(z₁'K_l z₁ + w'Φw), w = z_T − C_l'K_l z₁. Fixed effects that were
estimated add x̃'(X'V⁻¹X)⁻¹x̃, x̃ = x − H'z with H = G Z'V⁻¹X.
"""

import torch
from torch import Tensor, nn

from openreml_nn import likelihood
from openreml_nn.covariance import IncidenceMatrix, Matrix
from openreml_nn.covariance.structures.incidence import pairs_within
from openreml_nn.nn.batch import BatchTerm
from openreml_nn.solvers import RandomTerm, random_terms
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver
from openreml_nn.solvers.mixed_model_problem import MixedModelEvaluation

MATRICES_AT_PEAK = 4  # of the size of the covariance of the effects of the rest
AT_ONCE = 2**22  # elements of a matrix of rows by effects that is made for their variances


class Posterior(nn.Module):
    """Effects given the data; all of it is buffers, by `BUFFERS`.

    ``made_at`` are the parameters and the offset of the head it was made at, ``sigma2`` is σ²; ``effects`` are all û,
    term after term; ``prior`` is the covariance of the effects of a new level, term after term, flat; ``beta``,
    ``beta_cov``, ``kept`` and ``carried`` (H) are of the fixed effects; ``first`` says which term is eliminated level
    by level (−1: none), ``blocks`` are the K_l, ``start``, ``column`` and ``value`` the entries of the C_l, level after
    level, and ``rest`` is Φ. Without variances the last five are empty.
    """

    BUFFERS = ("made_at", "sigma2", "effects", "prior", "beta", "beta_cov", "kept", "carried", "first", "blocks",
               "start", "column", "value", "rest")  # fmt: skip

    made_at: Tensor
    sigma2: Tensor
    effects: Tensor
    prior: Tensor
    beta: Tensor
    beta_cov: Tensor
    kept: Tensor
    carried: Tensor
    first: Tensor
    blocks: Tensor
    start: Tensor
    column: Tensor
    value: Tensor
    rest: Tensor

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name in self.BUFFERS:
            self.register_buffer(name, buffers[name])

    # ---- predictions -------------------------------------------------------------------------------------------------

    def fixed(self, X: Tensor) -> Tensor:
        """Xβ̂, shape (m,)."""
        return X[:, self.kept] @ self.beta

    def mean(self, terms: list[BatchTerm], X: Tensor) -> Tensor:
        """Xβ̂ + Zû, shape (m,)."""
        total = self.fixed(X)
        for term, offset in zip(terms, _offsets(terms), strict=True):
            for column, value in _entries(term):
                total = total + value * self.effects[offset + column]
        return total

    def variance(self, terms: list[BatchTerm], X: Tensor) -> Tensor:
        """Variance of the error of Xβ̂ + Zû, shape (m,)."""
        if not len(self.start):
            raise ValueError(
                "The head was conditioned without variances: call `condition(..., variances=True)`, or ask for none, "
                "`variances=False`, on the command line `--model.variances false`."
            )
        pieces, width = [], max(1, AT_ONCE // max(len(self.rest), 1))
        for rows in torch.arange(len(X), device=X.device).split(width):
            own = [BatchTerm(t.effects, t.codes[rows], None if t.design is None else t.design[rows]) for t in terms]
            pieces.append(self._variance(own, X[rows]))
        return torch.cat(pieces) if pieces else X[:, :0].sum(1)

    def _variance(self, terms: list[BatchTerm], X: Tensor) -> Tensor:
        offsets, first = _offsets(terms), int(self.first)
        x = X[:, self.kept]
        total = self._of_new_levels(terms)
        rows, columns, values = [], [], []
        at = torch.arange(len(X), device=X.device)
        rest = 0
        for i, (term, offset) in enumerate(zip(terms, offsets, strict=True)):
            parts = _entries(term)
            if len(self.beta):
                x = x - sum(value[:, None] * self.carried[offset + column] for column, value in parts)
            if i == first:
                own, entries = self._by_level(term)
                total = total + self.sigma2 * own
                rows.append(entries[0])
                columns.append(entries[1])
                values.append(entries[2])
                continue
            for column, value in parts:
                rows.append(at)
                columns.append(rest + column)
                values.append(value)
            rest += term.effects.num_levels * term.effects.num_effects
        if rest:
            row, column, value = (torch.cat(parts) for parts in (rows, columns, values))
            total = total + self.sigma2 * quadratic_forms(self.rest, row, column, value, len(X))
        return total + ((x @ self.beta_cov) * x).sum(1)

    def _of_new_levels(self, terms: list[BatchTerm]) -> Tensor:
        """z'Gz of the levels that are not in the vocabulary."""
        total, at = self.effects.new_zeros(len(terms[0].codes)), 0
        for term in terms:
            s = term.effects.num_effects
            prior = self.prior[at : at + s * s].reshape(s, s)
            x = total.new_ones((len(total), 1)) if term.design is None else term.design
            total = total + (term.codes < 0) * ((x @ prior) * x).sum(1)
            at += s * s
        return total

    def _by_level(self, term: BatchTerm) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """z₁'K_l z₁ and the entries (row, column, value) of −C_l'K_l z₁."""
        level, known = term.codes.clamp(min=0), (term.codes >= 0).to(self.blocks.dtype)
        x = known[:, None] if term.design is None else known[:, None] * term.design
        Kx = torch.einsum("abm,mb->ma", self.blocks[:, :, level], x)
        count = (self.start[level + 1] - self.start[level]) * (term.codes >= 0)
        row = torch.arange(len(level), device=level.device).repeat_interleave(count)
        step = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        entry = self.start[level][row] + step
        value = -(self.value[:, entry] * Kx[row].mT).sum(0)
        return (x * Kx).sum(1), (row, self.column[entry], value)


def quadratic_forms(Phi: Tensor, row: Tensor, column: Tensor, value: Tensor, rows: int) -> Tensor:
    """w'Φw of sparse rows w, given by entries in any order, shape (rows,)."""
    size = torch.bincount(row, minlength=rows)
    if int(size.square().sum()) > rows * len(Phi):
        W = Phi.new_zeros((rows, len(Phi))).index_put_((row, column), value, accumulate=True)
        return ((W @ Phi) * W).sum(1)
    order = torch.argsort(row, stable=True)
    row, column, value = row[order], column[order], value[order]
    i, j = pairs_within(row, rows)
    return Phi.new_zeros(rows).index_add_(0, row[i], Phi[column[i], column[j]] * value[i] * value[j])


def _offsets(terms: list[BatchTerm]) -> list[int]:
    offsets, at = [], 0
    for term in terms:
        offsets.append(at)
        at += term.effects.num_levels * term.effects.num_effects
    return offsets


def _entries(term: BatchTerm) -> list[tuple[Tensor, Tensor]]:
    """Column and value of each row, one pair for each effect; 0 for unknown levels."""
    known = (term.codes >= 0).to(torch.float64)
    q, code = term.effects.num_levels, term.codes.clamp(min=0)
    return [(code + a * q, known if term.design is None else known * term.design[:, a])
            for a in range(term.effects.num_effects)]  # fmt: skip


def condition(V: Matrix, y: Tensor, X: Tensor, new_levels: list[Tensor], made_at: Tensor, variances: bool) -> Posterior:
    """The effects given the data, through the mixed-model equations.

    Args:
        V: Covariance of all rows, Σ ZGZ' + σ²I.
        y: Response, shape (n,).
        X: Fixed effects, shape (n, p).
        new_levels: Covariance of the effects of a new level, one for each term, shape (s, s).
        made_at: What the head compares with its parameters and its offset before a prediction.
        variances: Whether to keep what variances need: numbers by the square of the effects that are not eliminated.

    Raises:
        MemoryError: There are too many effects beside those of the largest factor.
    """
    with torch.no_grad():
        problem = MixedModelEquationsSolver().prepare(V, y.detach(), X.detach())
        q = problem.plan.size_of_rest
        if variances:
            require_memory(
                MATRICES_AT_PEAK * 8 * q * q, y.device, f"The covariance of {q} effects ({q} x {q})",
                "Predict without variances: `condition(..., variances=False)`.",
            )  # fmt: skip
        evaluation = problem.evaluate()
        assert isinstance(evaluation, MixedModelEvaluation)
        equations, fixed, empty = evaluation.equations, problem.fixed, y.new_zeros(0)
        terms = random_terms(V, evaluation.theta.detach())
        X0 = fixed.U @ fixed.R
        ViX = evaluation.solve(X0) if X0.shape[1] else X0
        carried = [term.G.matmul(term.G_params, term.Z.rmatmul(term.Z_params, ViX)) for term in terms]
        first = problem.plan.first_index
        start, column, value = _coupling(terms, first, y) if variances else (empty, empty, empty)
        return Posterior(
            made_at=made_at,
            sigma2=equations.sigma2.clone(),
            effects=torch.cat([likelihood.blup(evaluation, term) for term in terms]),
            prior=torch.cat([block.reshape(-1) for block in new_levels]),
            beta=likelihood.beta(evaluation),
            beta_cov=likelihood.beta_cov(evaluation),
            kept=torch.tensor(fixed.kept, dtype=torch.int64, device=y.device),
            carried=torch.cat(carried),
            first=torch.tensor(first, device=y.device),
            blocks=equations.K if variances else empty,
            start=start,
            column=column,
            value=value,
            rest=equations.Phi if variances else empty,
        )


def _coupling(terms: list[RandomTerm], first: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries that are not zero of C_l = Z₁'Z_T, of the levels of the first term one after the other.

    Returns:
        Where the entries of each level begin, shape (L + 1,), their columns, and their values, shape (s, entries).
    """
    Z = terms[first].Z if first >= 0 else None
    rest = [term.Z for i, term in enumerate(terms) if i != first]
    if not isinstance(Z, IncidenceMatrix):
        return torch.zeros(1, dtype=torch.int64, device=like.device), like.new_zeros(0).long(), like.new_zeros((1, 0))
    x, L, q = Z.effect_values(like), len(Z.levels), max(1, sum(other.shape[1] for other in rest))
    keys, values, offset = [Z.codes[:0]], [x[:0]], 0
    for other in rest:
        assert isinstance(other, IncidenceMatrix)
        for a, z in enumerate(other.effect_values(like).mT):
            keys.append(Z.codes * q + offset + a * len(other.levels) + other.codes)
            values.append(z[:, None] * x)
        offset += other.shape[1]
    keys, entry = torch.cat(keys).unique(return_inverse=True)
    value = x.new_zeros((len(keys), x.shape[1])).index_add_(0, entry, torch.cat(values))
    sizes = torch.bincount(keys // q, minlength=L)
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), keys % q, value.mT.contiguous()
