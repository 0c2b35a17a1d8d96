r"""One kernel plus noise, V = a·ZKZ' + b·I: one reduction A = QBQ' to a band, then everything in its coordinates.

With F the rows' coordinates (columns SQ, see `spectral_form`), c = F'v for a vector v of rows, H = (aB + bI)⁻¹ and v⊥
what of v the kernel does not reach,

    S'S = I, A = FBF':      V⁻¹v = F H c + v⊥/b,            AV⁻¹v = F B H c;
    A = FF', F'F = B:       V⁻¹v = −(a/b) F H c + v/b,      AV⁻¹v = F H c,

so that U and e enter through F'[U e] and the cross-products of what is left, and an evaluation takes n times the
bandwidth. The second line serves A = WW' through the small side of W; it holds for any rank of W.
"""

import math
from contextlib import AbstractContextManager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.solvers.base import COLUMNS_AT_ONCE, Evaluation, NotPositiveDefinite, Problem, Solver, unit_columns
from openreml_nn.solvers.closed_form import ClosedForm
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.reductions import Reduction, Source, reduce
from openreml_nn.solvers.spectral_form import KernelForm, kernel_form
from openreml_nn.solvers.terms import RandomTerm
from openreml_nn.solvers.threads import threads_for

LOST = 1e-3  # share of a quadratic form below which a difference loses too many digits of it


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
    """[U e] in the coordinates of the reduction, on the host.

    An evaluation costs so little that it runs there, wherever the data are: it reads θ from their device and sends ℓ,
    score and information back. Rows stay on the device, and so does the product of a vector of rows with Q.

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
        self.E = gram(left, left)
        self.U_left = left[:, :-1]

    def threads(self) -> AbstractContextManager[None]:
        return threads_for(self.C.numel())

    def _with(self, fixed: FixedEffects) -> "SpectralProblem":
        return SpectralProblem(self.V, fixed, self.form, self.reduction)

    def into(self, v: Tensor) -> Tensor:
        """F'v on the host, shape (size, m)."""
        return self.reduction.rotate(self.form.rows.into(v)).cpu()

    def out(self, c: Tensor) -> Tensor:
        """F c for c on the host, shape (n, m)."""
        return self.form.rows.out(self.reduction.rotate_back(c.to(self.fixed.e)))

    def scales(self, theta: Tensor) -> tuple[float, float, np.ndarray]:
        """a, b, and their derivatives with respect to θ, shape (2, k)."""
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            scales = self.form.scales(self.V, theta)
            rows = [torch.autograd.grad(s, theta, retain_graph=True, allow_unused=True)[0] if s.requires_grad else None
                    for s in scales]  # fmt: skip
        J = torch.stack([torch.zeros_like(theta) if row is None else row for row in rows])
        both = host(torch.cat([scales[:, None], J], dim=1))
        return float(both[0, 0]), float(both[1, 0]), both[:, 1:]

    def evaluate(self, theta: Tensor | None = None) -> "SpectralEvaluation":
        return SpectralEvaluation(self, self.V.theta if theta is None else theta)


def host(x: Tensor) -> np.ndarray:
    """A small matrix for NumPy, which starts an operation in a fifth of the time that PyTorch takes."""
    return x.detach().cpu().numpy().astype(np.float64, copy=False)


def gram(x: Tensor, y: Tensor) -> np.ndarray:
    """x'y of long columns."""
    return host(x.mT @ y)


class SpectralEvaluation(Evaluation):
    """aB + bI factored at one θ: products with it in PyTorch, the matrices of p + 1 columns in NumPy.

    Working variates are combinations of APy and Py: their two coefficients.
    """

    problem: SpectralProblem

    def __init__(self, problem: SpectralProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        self.a, self.b, self.of_theta = problem.scales(theta)
        with torch.no_grad():
            values = [self._factor(), *self._fit()]
            self._ePe = values[2]
            terms = np.column_stack([values, self._theta_jacobian()])
            f, of_theta = self._back(terms).split([1, len(theta)], dim=1)
        f = ClosedForm.apply(f[:, 0], SpectralSolver.name, of_theta, theta)
        logdet_M, self.yPy = self.followed_by_rows(SpectralSolver.name, f[1], f[2])
        self.logdet_V, self.logdet_XtViX = f[0], logdet_M + problem.fixed.logdet_RtR

    def _back(self, x: np.ndarray) -> Tensor:
        """A small matrix for PyTorch, where the data are."""
        return torch.from_numpy(x).to(self.problem.fixed.e.device)

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

    def _fit(self) -> tuple[float, float]:
        """log|U'V⁻¹U| and e'Pe; γ̂ in two steps, so that rounding of U'V⁻¹e does not stay in it."""
        C, E, p = self.problem.C, self.problem.E, self.problem.p
        HX = self.H(C)
        G = self.of_span * gram(C, HX) + self.of_rest * E
        self.M = G[:p, :p]
        self.L, self.M_inverse = np.linalg.cholesky(self.M), np.linalg.inv(self.M)
        self.z = z = np.append(-self.M_inverse @ G[:p, p], 1.0)
        z[:p] -= self.M_inverse @ (self.of_span * gram(HX[:, :p], C @ torch.from_numpy(z)) + self.of_rest * E[:p] @ z)
        c = C @ torch.from_numpy(z)
        HX[:, p] = HX @ torch.from_numpy(z)
        self.HX, self.HC_U, self.Hc = HX, HX[:, :p], HX[:, p]
        ePe = self.of_span * float(c @ self.Hc) + self.of_rest * float(z @ E @ z)
        return 2.0 * float(np.log(self.L.diagonal()).sum()), ePe

    @cached_property
    def gamma(self) -> Tensor:  # type: ignore[override]
        return self._back(-self.z[:-1])

    @cached_property
    def gamma_cov(self) -> Tensor:  # type: ignore[override]
        return self._back(self.M_inverse)

    # ---- derivatives -------------------------------------------------------------------------------------------------

    @cached_property
    def _second(self) -> np.ndarray:
        """X'V⁻¹AV⁻¹X and X'V⁻¹V⁻¹X for X = [U Fz], Fz = e − Uγ̂, shape (2, p + 1, p + 1).

        One of them gives the other, by a X'V⁻¹AV⁻¹X + b X'V⁻¹V⁻¹X = X'V⁻¹X.
        """
        p, span = self.problem.p, gram(self.HX, self.HX)
        whole = np.zeros_like(span)
        whole[:p, :p], whole[p, p] = self.M, self._ePe
        if not self.problem.form.rows.orthonormal:
            return np.stack([span, (whole - self.a * span) / self.b])
        T = np.eye(p + 1)
        T[:, p] = self.z
        without = span + self.of_rest**2 * (T.T @ self.problem.E @ T)
        part_of_A = whole - self.b * without
        if (part_of_A.diagonal() > LOST * whole.diagonal()).all():
            return np.stack([part_of_A / self.a, without])
        return np.stack([gram(self.HX, self.problem.reduction.times(self.HX)), without])

    def _theta_jacobian(self) -> np.ndarray:
        """∂(log|V|, log|U'V⁻¹U|, e'Pe)/∂θ, shape (3, k); zeros where it is not wanted."""
        return self._scale_jacobian() @ self.of_theta if self.theta.requires_grad else np.zeros((3, len(self.theta)))

    def _scale_jacobian(self) -> np.ndarray:
        """∂(log|V|, log|U'V⁻¹U|, e'Pe)/∂(a, b), shape (3, 2)."""
        problem, p, N = self.problem, self.problem.p, self._second
        of_a, of_b = problem.reduction.slopes(self.a, self.b)
        of_M = -(self.M_inverse * N[:, :p, :p]).sum((1, 2))
        return np.stack([np.array([of_a, of_b + problem.outside * self.of_rest]), of_M, -N[:, p, p]])

    # ---- average information -----------------------------------------------------------------------------------------

    def working_variates(self) -> Tensor:
        r"""[ȧ_k, ḃ_k], the coefficients of V̇_k P y on (APy, Py), shape (2, k)."""
        return self._back(self.of_theta[:, self.problem.V.free_index])

    def inner(self, rhs: Tensor) -> Tensor:
        problem, p, Hc, N = self.problem, self.problem.p, self.Hc[:, None], self._second
        BHc = problem.reduction.times(Hc)
        pair = torch.cat([Hc, BHc], dim=1)
        (s, sB), (_, sBB) = gram(pair, self.H(pair))
        if problem.form.rows.orthonormal:
            aa, ab, bb = sBB, sB, s + self.of_rest**3 * (self.z @ problem.E @ self.z)
        else:
            aa, ab, bb = sB, s, (N[1, p, p] - self.a * s) / self.b
        n = N[:, :p, p]
        K = self._back(np.array([[aa, ab], [ab, bb]]) - n @ self.M_inverse @ n.T)
        return rhs.mT @ K @ rhs

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, c: Tensor, left: Tensor) -> Tensor:
        """V⁻¹v from H F'v, on the host, and v⊥, shape (n, m)."""
        return self.of_span * self.problem.out(c) + self.of_rest * left

    @property
    def Py(self) -> Tensor:
        return self._rows_Py

    @cached_property
    def _rows_Py(self) -> Tensor:
        fixed = self.problem.fixed
        Fz = (fixed.e - fixed.U @ self.gamma).detach()[:, None]
        return self._rows(self.Hc[:, None], self.problem.form.rows.rest(Fz))[:, 0]

    @torch.no_grad()
    def solve(self, rhs: Tensor) -> Tensor:
        return self._rows(self.H(self.problem.into(rhs)), self.problem.form.rows.rest(rhs))

    def _UtVi(self, c: Tensor, left: Tensor) -> Tensor:
        """U'V⁻¹v on the host from F'v, there too, and v⊥, shape (p, m)."""
        return self.of_span * self.HC_U.mT @ c + self.of_rest * (self.problem.U_left.mT @ left).cpu()

    @torch.no_grad()
    def project(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        d = torch.from_numpy(self.M_inverse) @ self._UtVi(c, left)
        return self._rows(self.H(c) - self.HC_U @ d, left - self.problem.U_left @ d.to(left))

    @torch.no_grad()
    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        fitted = torch.linalg.solve_triangular(torch.from_numpy(self.L), self._UtVi(c, left), upper=False)
        reached = self.of_span * (c * self.H(c)).sum(0) - fitted.square().sum(0)
        return reached.to(left) + self.of_rest * left.square().sum(0)

    def explained_variance(self, term: RandomTerm) -> Tensor:
        """For A = WW' the effects are on the small side: ZG = aFQ', and a x'BHx = x'x − b x'Hx."""
        if self.problem.form.rows.orthonormal:
            return super().explained_variance(term)
        q, parts = term.G.shape[0], []
        for first in range(0, q, COLUMNS_AT_ONCE):
            x = self.problem.reduction.rotate(unit_columns(self.problem.fixed.e, q, first)).cpu()
            fitted = torch.linalg.solve_triangular(torch.from_numpy(self.L), self.a * self.HC_U.mT @ x, upper=False)
            parts.append(self.a * (1.0 - self.b * (x * self.H(x)).sum(0)) - fitted.square().sum(0))
        return torch.cat(parts).to(self.problem.fixed.e)
