r"""The marginal likelihood y ~ N(f, V(θ)), V = Σ Z G(θ) Z' + σ²I, of what a network gives, in all its modes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import CovariancePropagation, Matrix, ScalarMatrix, Sum
from openreml_nn.nn.batch import RESIDUAL, batch_deviance, one_effect_loss, scalar_like
from openreml_nn.nn.checks import (
    enough_rows,
    explained,
    finite,
    one_number,
    require_column,
    require_pair,
    without_autocast,
)
from openreml_nn.nn.dtypes import KeepsDtype
from openreml_nn.nn.effects import Effects
from openreml_nn.nn.factors import Factors, Groups
from openreml_nn.nn.first_batches import FirstBatches
from openreml_nn.nn.rows import Rows
from openreml_nn.nn.transforms import dense_deviance, require_plain_levels
from openreml_nn.optim import data_start
from openreml_nn.solvers import Solver
from openreml_nn.solvers.dense import DenseProblem
from openreml_nn.solvers.fixed_effects import prepare_fixed_effects
from openreml_nn.solvers.watching import transforming

MODES = ("batch", "exact", "features")


class MarginalLikelihood(KeepsDtype):
    """Base class of a head: its random effects, its parameters and its loss.

    Arguments, attributes and errors are those of `MixedModelHead`, which adds what comes after a training.
    """

    offset: Tensor

    def __init__(
        self,
        effects: Mapping[str, Effects],
        mode: str = "batch",
        method: str = "REML",
        residual: float = 1.0,
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__()
        if mode not in MODES or str(method).upper() not in ("REML", "ML"):
            raise ValueError(
                f"`MixedModelHead` needs a mode of {', '.join(map(repr, MODES))} and a method of 'REML' or 'ML', got "
                f"{mode!r} and {method!r}."
            )
        self.mode, self.method, self.solver = mode, str(method).upper(), solver
        self.factors = Factors(effects)
        self.residual = ScalarMatrix(1, start=residual)
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))
        self._first = FirstBatches()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "offset":
            self.offset.fill_(one_number(value))
        else:
            super().__setattr__(name, value)

    # ---- parameters --------------------------------------------------------------------------------------------------

    @property
    def effects(self) -> dict[str, Effects]:
        """The random effects by name."""
        return self.factors.effects

    @property
    def thetas(self) -> list[nn.Parameter]:
        """The raw thetas of all terms, each once; the weights of a kernel's network are not among them."""
        return self.factors.thetas_with(self.residual)

    def variance(self) -> dict[str, float]:
        """Variance parameters on their natural scale by name: ``subject/sigma^2``, ``residual/sigma^2``."""
        found: dict[str, float] = {}
        for name, matrix in [*((name, own.G) for name, own in self.effects.items()), (RESIDUAL, self.residual)]:
            values = matrix.natural(matrix.theta.detach()).tolist()
            found |= {f"{name}/{parameter}": x for parameter, x in zip(matrix.natural_names, values, strict=True)}
        return found

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def forward(self, output: Tensor, y: Tensor, groups: Groups | Rows) -> Tensor:
        """−ℓ per row, a scalar in float64, differentiable in ``output`` and in the thetas.

        With features the restricted likelihood is that of the contrasts of y with the columns of an orthonormal basis,
        log|X'V⁻¹X| − log|X'X| in the place of log|X'V⁻¹X|, so that the scale of the features does not matter.

        Args:
            output: What the network gives, of any floating-point type: f, shape (m,) or (m, 1), or features, (m, p).
            y: Response, shape (m,) or (m, 1).
            groups: For each factor its codes, shape (m,), or (codes, design) with slopes; what ``rows`` made of all
                rows once.

        Under ``torch.func`` (``functional_call`` with ``grad``, ``vmap``, ``hessian``, …) it goes through a dense V of
        the rows, which is twice differentiable, and looks at no values.

        Raises:
            TypeError: y or codes are no tensors.
            ValueError: Shapes or codes do not fit, ``vmap`` maps over codes, or the loss is not finite: missing or
                infinite values in y or in the output, or a variance parameter that has run away.
            NotPositiveDefinite: V is not positive definite at the present thetas.
        """
        require_pair(output, y)
        if not len(y):
            raise ValueError("`MixedModelHead` got a batch without rows.")
        if transforming():
            with without_autocast(output.device.type):
                return self._transformed_loss(output, y, groups)
        with without_autocast(output.device.type), explained(output, y, self.variance):
            loss = finite(self._loss(output, y, groups))
        if loss.requires_grad and not self._first.done:
            self._look(output, y, groups)
        return loss

    def _look(self, output: Tensor, y: Tensor, groups: Groups | Rows) -> None:
        """What is worth a warning in the first batches of a training."""
        whole = isinstance(groups, Rows) or self.mode == "exact"
        terms = [] if whole else self.factors.terms(groups, len(y))  # type: ignore[arg-type]
        with torch.no_grad():
            r, X = self.left_over(output, y)
            left = prepare_fixed_effects(r, X).e if X.shape[1] else r
            V = self._covariance_of(groups)
            variance = float(V.mean_diagonal(V.theta)) if any(p.requires_grad for p in self.thetas) else None
        self._first.look(left, y.reshape(-1), dict(zip(self.effects, terms, strict=False)), variance)

    def _loss(self, output: Tensor, y: Tensor, groups: Groups | Rows) -> Tensor:
        restricted, m = self.method == "REML", len(output)
        if isinstance(groups, Rows) or self.mode == "exact":
            rows = groups if isinstance(groups, Rows) else self.rows(groups)
            deviance, p = rows.deviance(*self.left_over(output, y), restricted)
        else:
            terms = self.factors.terms(groups, m)
            if self.mode == "batch" and len(terms) == 1 and terms[0].one_effect:
                require_column("The output", output)
                return one_effect_loss(terms[0], self.residual, output, y.to(torch.float64) - self.offset)
            r, X = self.left_over(output, y)
            with enough_rows(*X.shape):
                deviance, p = batch_deviance(terms, self.residual, r, X, restricted)
        return _per_row(deviance, m, p, restricted)

    def _transformed_loss(self, output: Tensor, y: Tensor, groups: Groups | Rows) -> Tensor:
        """The loss under a transform of ``torch.func``."""
        require_plain_levels(groups)
        terms, restricted = self.factors.terms(groups, len(output)), self.method == "REML"  # type: ignore[arg-type]
        deviance, p = dense_deviance(terms, self.residual, *self.left_over(output, y), restricted)
        return _per_row(deviance, len(output), p, restricted)

    def covariance(self, groups: Groups) -> Sum:
        """V over rows, shape (n, n), with the thetas of the head."""
        with torch.inference_mode(False):
            terms = self.factors.terms(groups)
            parts: dict[str, Matrix] = {
                name: CovariancePropagation(term.effects.incidence(term.codes, term.design), term.effects.G)
                for name, term in zip(self.effects, terms, strict=True)
            }
            return Sum(parts | {RESIDUAL: scalar_like(self.residual, len(terms[0].codes))})

    def _covariance_of(self, groups: Groups | Rows) -> Matrix:
        """V over rows, which `Rows` have made already."""
        return groups.V if isinstance(groups, Rows) else self.covariance(groups)

    def rows(self, groups: Groups) -> Rows:
        """What the exact likelihood needs of the levels of all rows, made once: give it as ``groups`` at each step."""
        return Rows(self.covariance(groups), self.solver)

    def start(self, y: Tensor, groups: Groups | Rows) -> None:
        """Set what a training starts from by the data: each term has an equal share of the variance of y.

        Fixed thetas stay. An offset of 0 becomes the mean of y; with features, where it does not count, it stays too.

        Args:
            y: Response of all rows, or of many, shape (n,) or (n, 1); y − f where the network is trained already.
            groups: Their levels.

        Raises:
            TypeError: y is no tensor.
            ValueError: Shapes or codes do not fit, y has missing or infinite values, or is constant.
        """
        require_pair(y, y)
        y, V = y.detach().reshape(-1).to(torch.float64), self._covariance_of(groups)
        if len(y) != V.shape[0]:
            rows = f"{len(y)} and {V.shape[0]}"
            raise ValueError(f"`MixedModelHead.start` needs y and groups of equal length, got {rows}.")
        V.set_theta(data_start(DenseProblem(V, prepare_fixed_effects(y))))
        if self.mode != "features" and not self.offset:
            self.offset = y.mean()

    # ---- what the network gives --------------------------------------------------------------------------------------

    def fixed_part(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """f and X of an output: with features f is 0, without X has no columns; float64."""
        if self.mode != "features":
            require_column("The output", output)
            f = output.reshape(-1).to(torch.float64) + self.offset
            return f, f.new_zeros((len(f), 0))
        if output.ndim != 2:
            raise ValueError(f"`MixedModelHead` needs features of shape (m, p), got {tuple(output.shape)}.")
        phi = output.to(torch.float64)
        return torch.zeros_like(phi[:, :0]).sum(1), torch.cat([torch.ones_like(phi[:, :1]), phi], dim=1)

    def left_over(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """y − f and X."""
        f, X = self.fixed_part(output)
        require_pair(f, y)
        return y.reshape(-1) - f, X


def _per_row(deviance: Tensor, m: int, p: int, restricted: bool) -> Tensor:
    """−ℓ per row from a deviance without its constant."""
    free = m - p if restricted else m
    return (deviance + free * math.log(2.0 * math.pi)) * (0.5 / m)
