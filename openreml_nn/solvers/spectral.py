r"""One kernel plus noise, V = a·ZKZ' + b·I: one reduction A = QBQ' to a band, then everything in its coordinates.

With F the rows' coordinates (columns SQ, see `spectral_form`), c = F'v for a vector v of rows, H = (aB + bI)⁻¹ and v⊥
what of v the kernel does not reach,

    S'S = I, A = FBF':      V⁻¹v = F H c + v⊥/b,            AV⁻¹v = F B H c;
    A = FF', F'F = B:       V⁻¹v = −(a/b) F H c + v/b,      AV⁻¹v = F H c,

so that U and e enter through F'[U e] and the cross-products of what is left, and an evaluation takes n times the
bandwidth. The second line serves A = WW' through the small side of W; it holds for any rank of W.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import COLUMNS_AT_ONCE, Evaluation, NotPositiveDefinite, Problem, Solver, unit_columns
from openreml_nn.solvers.closed_form import ClosedForm
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.reductions import Reduction, Source, reduce
from openreml_nn.solvers.spectral_form import KernelForm, kernel_form
from openreml_nn.solvers.terms import RandomTerm


class SpectralSolver(Solver):
    """Reduce the kernel to a band once, 4/3 n³ operations; an evaluation takes n times the square of the bandwidth.

    Args:
        reduction: What `reduce_kernel` or `reduce_factor` gave, or ``reduction`` of an earlier problem on the same
            kernel and records. It is found anew for each problem when left out.

    Example:
        >>> import torch
        >>> from openreml_nn.covariance import KnownMatrix, ScalarMatrix, Sum
        >>> from openreml_nn.solvers.reductions import reduce_kernel
        >>> from openreml_nn.solvers.spectral import SpectralSolver
        >>> K = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.3], [0.2, 0.3, 1.0]], dtype=torch.float64)
        >>> solver = SpectralSolver(reduce_kernel(K))
        >>> V = Sum(g=KnownMatrix(K), residual=ScalarMatrix(3))
        >>> evaluation = solver.prepare(V, torch.tensor([1.0, 2.0, 4.0])).evaluate()
    """

    name = "spectral"

    def __init__(self, reduction: Reduction | None = None) -> None:
        self.reduction = reduction

    def refusal(self, V: Matrix) -> str | None:
        form = kernel_form(V)
        return form if isinstance(form, str) else misfit(self.reduction, form.source)

    def cost(self, V: Matrix) -> str:
        form = kernel_form(V)
        if isinstance(form, str):
            return form
        m = form.source.size
        once = "no reduction" if self.reduction is not None else f"4/3 m³ = {4 / 3 * m**3:.1e} multiplications once"
        return f"{once}, m = {m}, then some {64 * m:.1e} an evaluation"

    def prepare(self, V: Matrix, y: Tensor, X: Tensor | None = None, *, rank: str = "drop") -> "SpectralProblem":
        form = kernel_form(V)
        if isinstance(form, str) or misfit(self.reduction, form.source):
            self.require(V)
        assert isinstance(form, KernelForm)
        fixed = prepare_fixed_effects(y, X, rank)
        return SpectralProblem(V, fixed, form, self.reduction or reduce(form.source))


def misfit(reduction: Reduction | None, source: Source) -> str | None:
    """Why a reduction does not belong to a source; None where it does."""
    if reduction is None or reduction.source.same(source):
        return None
    return (
        f"its reduction is of another kernel, or of other records, than those of V "
        f"({reduction.size} and {source.size} levels with records)."
    )


class SpectralProblem(Problem):
    """[U e] in the coordinates of the reduction.

    Attributes:
        reduction: The reduced kernel, which further problems on it may use.
    """

    def __init__(self, V: Matrix, fixed: FixedEffects, form: KernelForm, reduction: Reduction) -> None:
        super().__init__(V, fixed)
        self.form, self.reduction = form, reduction
        self.outside = self.n - reduction.size  # dimensions that the kernel does not reach
        both = torch.cat([fixed.U, fixed.e[:, None]], dim=1).detach()
        self.C = self.into(both)
        left = self.form.rows.rest(both)
        self.E = left.mT @ left
        self.U_left = left[:, :-1]

    def into(self, v: Tensor) -> Tensor:
        """F'v, shape (size, m)."""
        return self.reduction.rotate(self.form.rows.into(v))

    def out(self, c: Tensor) -> Tensor:
        """F c, shape (n, m)."""
        return self.form.rows.out(self.reduction.rotate_back(c))

    def scales(self, theta: Tensor) -> Tensor:
        """[a, b], shape (2,)."""
        return self.form.scales(self.V, theta).to(torch.float64)

    def evaluate(self, theta: Tensor | None = None) -> "SpectralEvaluation":
        return SpectralEvaluation(self, self.V.theta if theta is None else theta)


class SpectralEvaluation(Evaluation):
    """aB + bI factored at one θ.

    Working variates are combinations of APy and Py: their two coefficients.
    """

    problem: SpectralProblem

    def __init__(self, problem: SpectralProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        scales = problem.scales(theta)
        self.a, self.b = scales.detach().tolist()
        with torch.no_grad():
            logdet_V = self._factor()
            self._fit()
            logdet_M = 2.0 * self.L.diagonal().log().sum()
            f = torch.stack([logdet_M.new_tensor(logdet_V), logdet_M, self._ePe])
            given, jacobians = self._jacobians(scales)
        f = ClosedForm.apply(f, "spectral", *jacobians, *given)
        self.logdet_V, self.logdet_XtViX, self.yPy = f[0], f[1] + problem.fixed.logdet_RtR, f[2]

    # ---- factor, γ̂ and e'Pe ------------------------------------------------------------------------------------------

    def _factor(self) -> float:
        """Factor aB + bI; returns log|V|."""
        problem, a, b = self.problem, self.a, self.b
        try:
            if problem.outside and not b > 0:
                raise torch.linalg.LinAlgError("no residual variance")
            factored = problem.reduction.factor(a, b)
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefinite(
                f"V is not positive definite at a variance of {a:.4g} for {problem.form.name!r} and {b:.4g} for the "
                f"residual ({error}). Is there a residual variance, and is the kernel positive semi-definite?"
            ) from error
        self.H, logdet = factored.solve, factored.logdet
        self.of_rest = 1.0 / b if problem.outside else 0.0
        self.of_span = 1.0 if problem.form.rows.orthonormal else -a / b
        return logdet + (problem.outside * math.log(b) if problem.outside else 0.0)

    def _fit(self) -> None:
        """γ̂ and e'Pe; γ̂ in two steps, so that rounding of U'V⁻¹e does not stay in it."""
        C, E, p = self.problem.C, self.problem.E, self.problem.p
        HX = self.H(C)
        G = (self.of_span * C.mT) @ HX + self.of_rest * E
        self.M = G[:p, :p]
        self.L = torch.linalg.cholesky(self.M)
        self.M_inverse = torch.cholesky_inverse(self.L)
        z = torch.ones_like(E[0])
        z[:p] = -self.M_inverse @ G[:p, p]
        z[:p] -= self.M_inverse @ (self.of_span * HX[:, :p].mT @ (C @ z) + self.of_rest * E[:p] @ z)
        HX[:, p] = HX @ z
        self.HX, self.HC_U, self.Hc, self.z = HX, HX[:, :p], HX[:, p], z
        self.gamma, self.gamma_cov = -z[:p], self.M_inverse
        self._ePe = self.of_span * (C @ z) @ self.Hc + self.of_rest * (z @ E @ z)

    # ---- derivatives -------------------------------------------------------------------------------------------------

    @cached_property
    def _WHX(self) -> Tensor:
        """W H [F'U F'Fz] with v'V⁻¹AV⁻¹v = (Hc)'W(Hc), shape (size, p + 1)."""
        return self.problem.reduction.times(self.HX) if self.problem.form.rows.orthonormal else self.HX

    @cached_property
    def _second(self) -> tuple[Tensor, Tensor]:
        """X'V⁻¹AV⁻¹X and X'V⁻¹V⁻¹X for X = [U Fz], Fz = e − Uγ̂, both of shape (p + 1, p + 1)."""
        problem, p, HX = self.problem, self.problem.p, self.HX
        with_A = HX.mT @ self._WHX
        if problem.form.rows.orthonormal:
            T = torch.eye(p + 1, dtype=HX.dtype, device=HX.device)
            T[:, p] = self.z
            return with_A, HX.mT @ HX + self.of_rest**2 * (T.mT @ problem.E @ T)
        whole = torch.zeros_like(with_A)
        whole[:p, :p], whole[p, p] = self.M, self._ePe
        return with_A, (whole - self.a * with_A) / self.b

    def _jacobians(self, scales: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of the three terms, and their derivatives with respect to each of them."""
        fixed = self.problem.fixed
        given, jacobians = [scales], [torch.zeros((3, 2), dtype=torch.float64, device=scales.device)]
        if scales.requires_grad:
            jacobians = [self._scale_jacobian()]
        if fixed.U.requires_grad or fixed.e.requires_grad:
            Py, P_U = self._rows_Py, self.solve(fixed.U.detach()) @ self.M_inverse
            zero = torch.zeros_like
            given += [fixed.U, fixed.e]
            jacobians.append(torch.stack([zero(P_U), 2.0 * P_U, -2.0 * torch.outer(Py, self.gamma)]))
            jacobians.append(torch.stack([zero(Py), zero(Py), 2.0 * Py]))
        return given, jacobians

    def _scale_jacobian(self) -> Tensor:
        """∂(log|V|, log|U'V⁻¹U|, e'Pe)/∂(a, b), shape (3, 2)."""
        problem, p = self.problem, self.problem.p
        of_a, of_b = problem.reduction.slopes(self.a, self.b)
        N = torch.stack(self._second)
        first = self._ePe.new_tensor([of_a, of_b + problem.outside * self.of_rest])
        return torch.stack([first, -(self.M_inverse * N[:, :p, :p]).sum((1, 2)), -N[:, p, p]])

    # ---- average information -----------------------------------------------------------------------------------------

    def working_variates(self) -> Tensor:
        r"""[ȧ_k, ḃ_k], the coefficients of V̇_k P y on (APy, Py), shape (2, k)."""
        V, theta = self.problem.V, self.theta.detach().requires_grad_()
        with torch.enable_grad():
            scales = self.problem.scales(theta)
            rows = [torch.autograd.grad(s, theta, retain_graph=True, allow_unused=True)[0] if s.requires_grad else None
                    for s in scales]  # fmt: skip
        zero = torch.zeros_like(theta)
        return torch.stack([zero if row is None else row for row in rows])[:, V.free_index].to(self.z)

    def inner(self, rhs: Tensor) -> Tensor:
        problem, p, Hc, z = self.problem, self.problem.p, self.Hc[:, None], self.z
        N, WHc = torch.stack(self._second), self._WHX[:, p:]
        BHc = WHc if problem.form.rows.orthonormal else problem.reduction.times(Hc)
        HHc, HBHc = self.H(torch.cat([Hc, BHc], dim=1)).split(1, dim=1)
        aa, ab = (WHc * HBHc).sum(), (WHc * HHc).sum()
        if problem.form.rows.orthonormal:
            bb = (Hc * HHc).sum() + self.of_rest**3 * (z @ problem.E @ z)
        else:
            bb = (N[1, p, p] - self.a * ab) / self.b
        n = N[:, :p, p]
        K = torch.stack([aa, ab, ab, bb]).reshape(2, 2) - n @ self.M_inverse @ n.mT
        return rhs.mT @ K @ rhs

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, c: Tensor, left: Tensor) -> Tensor:
        """V⁻¹v from H F'v and v⊥, shape (n, m)."""
        return self.of_span * self.problem.out(c) + self.of_rest * left

    @property
    def Py(self) -> Tensor:
        return self._rows_Py

    @cached_property
    def _rows_Py(self) -> Tensor:
        fixed = self.problem.fixed
        Fz = (fixed.e - fixed.U @ self.gamma).detach()[:, None]
        return self._rows(self.Hc[:, None], self.problem.form.rows.rest(Fz))[:, 0]

    def solve(self, rhs: Tensor) -> Tensor:
        return self._rows(self.H(self.problem.into(rhs)), self.problem.form.rows.rest(rhs))

    def _UtVi(self, c: Tensor, left: Tensor) -> Tensor:
        """U'V⁻¹v from F'v and v⊥, shape (p, m)."""
        return self.of_span * self.HC_U.mT @ c + self.of_rest * self.problem.U_left.mT @ left

    def project(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        d = self.M_inverse @ self._UtVi(c, left)
        return self._rows(self.H(c) - self.HC_U @ d, left - self.problem.U_left @ d)

    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        fitted = torch.linalg.solve_triangular(self.L, self._UtVi(c, left), upper=False)
        squares = self.of_span * (c * self.H(c)).sum(0) + self.of_rest * left.square().sum(0)
        return squares - fitted.square().sum(0)

    def explained_variance(self, term: RandomTerm) -> Tensor:
        """For A = WW' the effects are on the small side: ZG = aFQ', and a x'BHx = x'x − b x'Hx."""
        if self.problem.form.rows.orthonormal:
            return super().explained_variance(term)
        q, parts = term.G.shape[0], []
        for first in range(0, q, COLUMNS_AT_ONCE):
            x = self.problem.reduction.rotate(unit_columns(self.Hc, q, first))
            fitted = torch.linalg.solve_triangular(self.L, self.a * self.HC_U.mT @ x, upper=False)
            parts.append(self.a * (1.0 - self.b * (x * self.H(x)).sum(0)) - fitted.square().sum(0))
        return torch.cat(parts)
