r"""Several traits of related individuals, V = Σ_g ⊗ K + Σ_e ⊗ I: rotated by the eigenvectors of K, blocks of size t.

With K = QΛQ' the rotated records of individual i have the covariance V_i = λ_i Σ_g + Σ_e and are independent of all
others, so that log|V| = Σ log|V_i| and

    ∂log|V| / ∂Σ_g = Σ λ_i V_i⁻¹,   ∂log|V| / ∂Σ_e = Σ V_i⁻¹.

Each individual has each trait once. Source: Meyer (1985), Biometrics 41, 153-165, without the transformation of Σ_g and
Σ_e to diagonal form, which a singular Σ_e does not have.
"""

from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import Evaluation, NotPositiveDefinite, Problem, Solver, along_free
from openreml_nn.solvers.closed_form import ClosedForm
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.reductions import Reduction, SpectralDecomposition, reduce
from openreml_nn.solvers.spectral import misfit
from openreml_nn.solvers.threads import threads_for
from openreml_nn.solvers.trait_form import TraitForm, trait_form


class SpectralTraitsSolver(Solver):
    """Find the eigenvectors of the kernel once; an evaluation takes n t³ operations.

    Args:
        reduction: What ``reduce_kernel(K, counts, eigenvectors=True)`` gave, or ``reduction`` of an earlier problem on
            the same kernel and individuals; ``counts`` are 1 for individuals with records, else 0. It is found anew for
            each problem when left out.
    """

    name = "spectral_traits"

    def __init__(self, reduction: Reduction | None = None) -> None:
        if not isinstance(reduction, (SpectralDecomposition, type(None))):
            raise ValueError("`SpectralTraitsSolver` needs a reduction with eigenvectors: give eigenvectors=True.")
        self.reduction = reduction

    def refusal(self, V: Matrix) -> str | None:
        form = trait_form(V)
        return form if isinstance(form, str) else misfit(self.reduction, form.source)

    def cost(self, V: Matrix) -> str:
        form = trait_form(V)
        if isinstance(form, str):
            return form
        n, t = form.source.size, form.traits
        once = "no reduction" if self.reduction is not None else f"9 n³ = {9.0 * n**3:.1e} multiplications once"
        return f"{once}, n = {n} individuals, then n t³ = {float(n * t**3):.1e} an evaluation"

    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "SpectralTraitsProblem":
        form = trait_form(V)
        if isinstance(form, str) or misfit(self.reduction, form.source):
            self.require(V)
        assert isinstance(form, TraitForm)
        fixed = prepare_fixed_effects(y, X, rank)
        n, t, p = form.source.size, form.traits, fixed.p
        require_memory(8 * n * t * (4 * p + 6 * t), fixed.e.device, f"A problem of {n} individuals and {t} traits")
        reduction = self.reduction or reduce(form.source, eigenvectors=True)
        assert isinstance(reduction, SpectralDecomposition)
        return SpectralTraitsProblem(V, fixed, form, reduction)


class SpectralTraitsProblem(Problem):
    """[U e] rotated: one block of t rows for each eigenvalue, shape (n, t, p + 1).

    Attributes:
        reduction: The eigenvectors of the kernel, which further problems on it may use.
    """

    def __init__(self, V: Matrix, fixed: FixedEffects, form: TraitForm, reduction: SpectralDecomposition) -> None:
        super().__init__(V, fixed)
        self.form, self.reduction, self.traits = form, reduction, form.traits
        self.eigenvalues = reduction.eigenvalues.to(fixed.e)
        self.F = self.into(torch.cat([fixed.U, fixed.e[:, None]], dim=1).detach())

    def threads(self) -> AbstractContextManager[None]:
        return threads_for(self.F.numel() * self.traits)

    def _with(self, fixed: FixedEffects) -> "SpectralTraitsProblem":
        return SpectralTraitsProblem(self.V, fixed, self.form, self.reduction)

    def into(self, v: Tensor) -> Tensor:
        """Rows, shape (n t, m), as rotated blocks, shape (n, t, m)."""
        grid = v[self.form.order].reshape(len(self.eigenvalues), -1)
        return self.reduction.rotate(grid).reshape(len(grid), self.traits, -1)

    def out(self, blocks: Tensor) -> Tensor:
        """The inverse of ``into``."""
        grid = self.reduction.rotate_back(blocks.reshape(len(blocks), -1)).reshape(self.n, -1)
        return torch.empty_like(grid).index_copy_(0, self.form.order, grid)

    def sigmas(self, theta: Tensor) -> Tensor:
        """Σ_g and Σ_e, shape (2, t, t)."""
        return torch.stack([self.form.sigma_g.of(self.V, theta), self.form.sigma_e.of(self.V, theta)]).to(torch.float64)

    def evaluate(self, theta: Tensor | None = None) -> "SpectralTraitsEvaluation":
        return SpectralTraitsEvaluation(self, self.V.theta if theta is None else theta)


class SpectralTraitsEvaluation(Evaluation):
    """λ_i Σ_g + Σ_e = L_i L_i' at one θ. Working variates are rotated: shape (n t, k)."""

    problem: SpectralTraitsProblem

    def __init__(self, problem: SpectralTraitsProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        sigmas = problem.sigmas(theta)
        with torch.no_grad():
            f = self._fit(*sigmas.detach())
            jacobian = self._jacobian(sigmas)
        f = ClosedForm.apply(f, SpectralTraitsSolver.name, jacobian, sigmas)
        logdet_M, self.yPy = self.followed_by_rows(SpectralTraitsSolver.name, f[1], f[2])
        self.logdet_V, self.logdet_XtViX = f[0], logdet_M + problem.fixed.logdet_RtR

    def _fit(self, sigma_g: Tensor, sigma_e: Tensor) -> Tensor:
        """Factor, γ̂ and Pe; returns (log|V|, log|U'V⁻¹U|, e'Pe)."""
        problem, p = self.problem, self.problem.p
        self.L, info = torch.linalg.cholesky_ex(problem.eigenvalues[:, None, None] * sigma_g + sigma_e)
        if bool(info.any()):
            worst = float(problem.eigenvalues[info > 0].min())
            raise NotPositiveDefinite(
                f"V is not positive definite: λ Σ_g + Σ_e has no Cholesky factor at the eigenvalue λ = {worst:.3g} of "
                f"the kernel. Is Σ_e positive definite, and the kernel positive semi-definite?"
            )
        W = self._whiten(problem.F)
        W, w = W[:, :p], W[:, p]
        Lm = torch.linalg.cholesky(W.mT @ W)
        Qh = solve_triangular(Lm, W.mT, upper=False).mT
        s = Qh.mT @ w
        r = w - Qh @ s
        again = Qh.mT @ r
        r, s = r - Qh @ again, s + again
        self.gamma = solve_triangular(Lm.mT, s[:, None], upper=True)[:, 0]
        self.gamma_cov = torch.cholesky_solve(torch.eye(p, dtype=Lm.dtype, device=Lm.device), Lm)
        self.Qh = Qh
        both = self._unwhiten(torch.cat([Qh, r[:, None]], dim=1))
        self.Q, self.Pe = both[..., :p], both[..., p]
        logdet_V = 2.0 * self.L.diagonal(dim1=1, dim2=2).log().sum()
        return torch.stack([logdet_V, 2.0 * Lm.diagonal().log().sum(), r.square().sum()])

    def _whiten(self, blocks: Tensor) -> Tensor:
        """L_i⁻¹ of each block, shape (n t, m)."""
        return solve_triangular(self.L, blocks, upper=False).flatten(0, 1)

    def _unwhiten(self, rows: Tensor) -> Tensor:
        """L_i⁻ᵀ of each block, shape (n, t, m)."""
        return solve_triangular(self.L.mT, rows.reshape(len(self.L), self.problem.traits, -1), upper=True)

    def _jacobian(self, sigmas: Tensor) -> Tensor:
        """∂(log|V|, log|U'V⁻¹U|, e'Pe)/∂(Σ_g, Σ_e), shape (3, 2, t, t); zeros where it is not wanted."""
        if not sigmas.requires_grad:
            return sigmas.detach().new_zeros((3, *sigmas.shape))
        by_block = torch.stack(
            [torch.cholesky_inverse(self.L), -self.Q @ self.Q.mT, -self.Pe[:, :, None] * self.Pe[:, None]]
        )
        of_g = torch.einsum("i,fiab->fab", self.problem.eigenvalues, by_block)
        return torch.stack([of_g, by_block.sum(1)], dim=1)

    # ---- average information -----------------------------------------------------------------------------------------

    def working_variates(self) -> Tensor:
        r"""(λ_i Σ̇_g + Σ̇_e) Pe_i for each free parameter, shape (n t, k)."""
        problem, t = self.problem, self.problem.traits
        moved = along_free(problem.V, self.theta, lambda theta: problem.sigmas(theta).flatten())
        g, e = moved.reshape(2, t, t, -1)
        by_g, by_e = (torch.einsum("ib,abk->iak", self.Pe, part) for part in (g, e))
        return (problem.eigenvalues[:, None, None] * by_g + by_e).flatten(0, 1)

    def inner(self, rhs: Tensor) -> Tensor:
        W = self._whiten(rhs.reshape(len(self.L), self.problem.traits, -1))
        q = self.Qh.mT @ W
        return W.mT @ W - q.mT @ q

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def Py(self) -> Tensor:
        return self._rows_Py

    @cached_property
    def _rows_Py(self) -> Tensor:
        return self.problem.out(self.Pe[..., None])[:, 0]

    def solve(self, rhs: Tensor) -> Tensor:
        return self.problem.out(self._unwhiten(self._whiten(self.problem.into(rhs))))

    def project(self, rhs: Tensor) -> Tensor:
        W = self._whiten(self.problem.into(rhs))
        return self.problem.out(self._unwhiten(W - self.Qh @ (self.Qh.mT @ W)))

    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        W = self._whiten(self.problem.into(rhs))
        return W.square().sum(0) - (self.Qh.mT @ W).square().sum(0)
