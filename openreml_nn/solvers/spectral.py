r"""One kernel plus noise, V = a·ZKZ' + b·I: one reduction A = QBQ' to a band, then everything in its coordinates.

An evaluation takes n times the bandwidth; its numbers are those of `kernel_equations`. The same coordinates serve
A = WW' through the small side of W, which holds for any rank of W.
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
from openreml_nn.solvers.kernel_equations import KernelData, KernelEquations
from openreml_nn.solvers.kernel_profile import profiled_variances
from openreml_nn.solvers.reductions import Reduction, reduce
from openreml_nn.solvers.sources import Source
from openreml_nn.solvers.spectral_form import KernelForm, kernel_form
from openreml_nn.solvers.terms import RandomTerm
from openreml_nn.solvers.threads import threads_for


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
        numbers = self.n * (self.p + 1)
        with threads_for(numbers, numbers * self.n):
            both = torch.cat([fixed.U, fixed.e[:, None]], dim=1).detach()
            left = form.rows.rest(both)
            C = self.into(both).mT.contiguous().mT
            outside = self.n - reduction.size
            self.data = KernelData(reduction, form.rows.orthonormal, outside, C, (left.mT @ left).cpu().numpy())
        self.U_left = left[:, :-1]

    def threads(self) -> AbstractContextManager[None]:
        return threads_for(self.data.C.numel())

    def moment_variances(self) -> dict[int, float]:
        index, mean = self.form.variances, self.reduction.trace / self.n
        if index is None or not mean > 0.0:
            return {}
        try:
            variances = profiled_variances(self.data, self.n - self.p, -math.log(mean))  # from equal shares
        except torch.linalg.LinAlgError:
            return {}
        return dict(zip(index, variances, strict=True))

    def _with(self, fixed: FixedEffects) -> "SpectralProblem":
        return SpectralProblem(self.V, fixed, self.form, self.reduction)

    def into(self, v: Tensor) -> Tensor:
        """F'v on the host, shape (size, m)."""
        return self.reduction.rotate(self.form.rows.into(v)).cpu()

    def out(self, c: Tensor) -> Tensor:
        """F c for c on the host, shape (n, m)."""
        return self.form.rows.out(self.reduction.rotate_back(c.to(self.fixed.e)))

    def evaluate(self, theta: Tensor | None = None) -> "SpectralEvaluation":
        return SpectralEvaluation(self, self.V.theta if theta is None else theta)


class SpectralEvaluation(Evaluation):
    """The numbers at one θ on the host, and products with rows.

    Working variates are combinations of APy and Py: their two coefficients.
    """

    problem: SpectralProblem

    def __init__(self, problem: SpectralProblem, theta: Tensor) -> None:
        self.problem, self.theta = problem, theta
        scales, self.of_theta = problem.form.scales(problem.V, theta)
        at = self.at = self._factor(*scales)
        values = np.zeros((3, 1 + len(theta)))
        values[:, 0] = at.logdet_V, at.logdet_M, at.ePe
        if theta.requires_grad:
            values[:, 1:] = at.jacobian() @ self.of_theta
        f, of_theta = self._back(values).split([1, len(theta)], dim=1)
        logdet_V, logdet_M, ePe = ClosedForm.apply(f[:, 0], SpectralSolver.name, of_theta, theta).unbind()
        logdet_M, self.yPy = self.followed_by_rows(SpectralSolver.name, logdet_M, ePe)
        self.logdet_V, self.logdet_XtViX = logdet_V, logdet_M + problem.fixed.logdet_RtR

    def _factor(self, a: float, b: float) -> KernelEquations:
        try:
            return KernelEquations(self.problem.data, a, b)
        except torch.linalg.LinAlgError as error:
            raise NotPositiveDefinite(
                f"V is not positive definite at a variance of {a:.4g} for {self.problem.form.name!r} and {b:.4g} for "
                f"the residual ({error}). Is there a residual variance, and is the kernel positive semi-definite?"
            ) from error

    def _back(self, x: np.ndarray) -> Tensor:
        """A small matrix for PyTorch, where the data are."""
        return torch.from_numpy(x).to(self.problem.fixed.e.device)

    @property
    def gamma(self) -> Tensor:  # type: ignore[override]
        return self._back(-self.at.z[:-1])

    @property
    def gamma_cov(self) -> Tensor:  # type: ignore[override]
        return self._back(self.at.M_inverse)

    def working_variates(self) -> Tensor:
        r"""[ȧ_k, ḃ_k], the coefficients of V̇_k P y on (APy, Py), shape (2, k)."""
        return self._back(self.of_theta[:, self.problem.V.free_index])

    def inner(self, rhs: Tensor) -> Tensor:
        return rhs.mT @ self._back(self.at.information()) @ rhs

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, c: Tensor, left: Tensor) -> Tensor:
        """V⁻¹v from H F'v, on the host, and v⊥, shape (n, m)."""
        return self.at.of_span * self.problem.out(c) + self.at.of_rest * left

    @property
    def Py(self) -> Tensor:
        return self._rows_Py

    @cached_property
    def _rows_Py(self) -> Tensor:
        fixed = self.problem.fixed
        Fz = (fixed.e - fixed.U @ self.gamma).detach()[:, None]
        return self._rows(self._HX[:, -1:], self.problem.form.rows.rest(Fz))[:, 0]

    @property
    def _HX(self) -> Tensor:
        return torch.from_numpy(self.at.HX)

    @torch.no_grad()
    def solve(self, rhs: Tensor) -> Tensor:
        return self._rows(self.at.H(self.problem.into(rhs)), self.problem.form.rows.rest(rhs))

    def _UtVi(self, c: Tensor, left: Tensor) -> Tensor:
        """U'V⁻¹v on the host from F'v, there too, and v⊥, shape (p, m)."""
        return self.at.of_span * self._HX[:, :-1].mT @ c + self.at.of_rest * (self.problem.U_left.mT @ left).cpu()

    def _fitted(self, UtViv: Tensor) -> Tensor:
        """L⁻¹U'V⁻¹v, shape (p, m)."""
        return torch.linalg.solve_triangular(torch.from_numpy(self.at.L), UtViv, upper=False)

    @torch.no_grad()
    def project(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        d = torch.from_numpy(self.at.M_inverse) @ self._UtVi(c, left)
        return self._rows(self.at.H(c) - self._HX[:, :-1] @ d, left - self.problem.U_left @ d.to(left))

    @torch.no_grad()
    def inner_diagonal(self, rhs: Tensor) -> Tensor:
        c, left = self.problem.into(rhs), self.problem.form.rows.rest(rhs)
        reached = self.at.of_span * (c * self.at.H(c)).sum(0) - self._fitted(self._UtVi(c, left)).square().sum(0)
        return reached.to(left) + self.at.of_rest * left.square().sum(0)

    def explained_variance(self, term: RandomTerm) -> Tensor:
        """For A = WW' the effects are on the small side: ZG = aFQ', and a x'BHx = x'x − b x'Hx."""
        if self.problem.form.rows.orthonormal:
            return super().explained_variance(term)
        q, parts, at = term.G.shape[0], [], self.at
        for first in range(0, q, COLUMNS_AT_ONCE):
            x = self.problem.reduction.rotate(unit_columns(self.problem.fixed.e, q, first)).cpu()
            fitted = self._fitted(at.a * self._HX[:, :-1].mT @ x)
            parts.append(at.a * (1.0 - at.b * (x * at.H(x)).sum(0)) - fitted.square().sum(0))
        return torch.cat(parts).to(self.problem.fixed.e)
