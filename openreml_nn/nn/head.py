r"""The head of a network for clustered data: y = f(x) + Σ Zb + ε, trained by the marginal likelihood.

The network gives f, the head adds random effects b ~ N(0, G(θ)) and a residual variance σ². Its loss is −ℓ per row, and
its gradient reaches the network and θ in one backward pass. Here is what comes after a training: random effects from
all rows, predictions, the refit.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.fit import fit
from openreml_nn.nn.checks import require_finite, require_pair
from openreml_nn.nn.effects import Effects
from openreml_nn.nn.factors import Groups
from openreml_nn.nn.marginal import MarginalLikelihood
from openreml_nn.nn.posterior import Posterior, condition
from openreml_nn.nn.rows import Rows
from openreml_nn.result import FitResult
from openreml_nn.solvers import Solver


class MixedModelHead(MarginalLikelihood):
    r"""Loss and predictions of y ~ N(f, V(θ)), V = Σ Z G(θ) Z' + σ²I, for a network that gives f.

    ============== ============================= ==========================================================
    ``mode``       output of the network         likelihood
    ============== ============================= ==========================================================
    ``"batch"``    f, shape (m,) or (m, 1)       of the rows of a batch, as if they were all there are
    ``"exact"``    f, shape (n,) or (n, 1)       of all rows, through the solver that V allows
    ``"features"`` φ, shape (m, p)               f = β₀ + φβ, β profiled out: restricted, or full
    ============== ============================= ==========================================================

    Batches of whole clusters, as `ClusterBatchSampler` draws them, leave out no covariance of that factor: with one
    factor their log-likelihoods add up to the exact one. Of every other factor, and of a kernel over levels, a batch
    sees only the rows that it has; what rows of different batches have in common is left out, which makes the estimates
    less efficient and, where f takes up part of the effects, biased.

    With features each batch has coefficients of its own, fitted to its rows, which takes p + 1 of its m degrees of
    freedom. For given features the score of REML has mean 0 all the same; by ML σ² comes out too small by a share of
    about (p + 1) / m. But the features are trained for coefficients that change from batch to batch. Take batches of
    m ≫ p rows; m must be above p + 1. All rows at once, ``head(phi, y, head.rows(groups))``, have one set of them.

    Before a training call ``start`` with all of its rows, as `MixedModelRegressor` does. Thetas are logarithms of
    standard deviations or of their like, and an optimizer moves them by about its learning rate a step: from variances
    of 1 it comes to those of a y with a variance of 400 late, or never. The mean of y a network finds by the bias of
    its last layer, and until it has, the random effects stand in for it. ``offset``, which f has added to it, takes
    this from the network: ``start`` sets it to the mean of y. With features the intercept is estimated, and the offset
    does not count.

    Args:
        effects: Random effects by name, one entry for each factor; `Effects` says how to write which.
        mode: ``"batch"``, ``"exact"`` or ``"features"``.
        method: ``"REML"`` or ``"ML"`` for features; without features the two are the same.
        residual: Start value of σ².
        solver: Solver of the exact likelihood and of ``refit``: ``"auto"``, the name of a solver, or a solver. Batches
            do not ask for it: ``batch_deviance`` says how theirs is computed. ``mode="exact", solver="dense"`` gives
            second derivatives.

    Attributes:
        effects: The random effects by name.
        residual: σ², a `ScalarMatrix`.
        offset: A number that is added to f, a buffer of shape (); 0 unless it was set, by ``start`` or as in
            ``head.offset = y.mean()``.
        posterior: The random effects given the training rows, after `condition` or `refit`; None before.

    Raises:
        TypeError: Effects are not by name, or not `Effects`; or an offset is set to anything but a finite number.
        ValueError: No effects, a name is taken, or an option that does not exist.

    Warns:
        UserWarning: In the first batch of a training y is far from what the network gives, or varies more than ten
            times as much as the variance parameters say, or less than a tenth: call ``start``. Or its first two batches
            have rows of the same levels: give batches of whole clusters.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import Effects, MixedModelHead
        >>> head = MixedModelHead({"subject": Effects(3)})
        >>> output, y = torch.zeros(4, 1), torch.tensor([1.0, 2.0, 0.0, -1.0])
        >>> loss = head(output, y, {"subject": torch.tensor([0, 0, 1, 2])})
        >>> loss.backward()

    Source: Simchoni & Rosset (2021), NeurIPS 34, 25111-25122; (2023), JMLR 24 (156), 1-57.
    """

    def __init__(
        self,
        effects: Mapping[str, Effects],
        mode: str = "batch",
        method: str = "REML",
        residual: float = 1.0,
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__(effects, mode, method, residual, solver)
        self.posterior: Posterior | None = None

    def condition(self, output: Tensor, y: Tensor, groups: Groups | Rows, variances: bool = True) -> None:
        """Predict the random effects from all training rows, for ``predict``; the thetas stay.

        Args:
            output: What the trained network gives for all training rows.
            y: Their response.
            groups: Their levels.
            variances: Keep the covariance of the effects, which takes the square of the number of effects beside the
                factor with the most; without it ``predict`` gives no variances.

        Raises:
            MemoryError: There are too many effects for their covariance.
        """
        r, X = self._all_rows(output, y)
        self.posterior = self._given(self._covariance_of(groups), r, X, variances)

    def predict(
        self, output: Tensor, groups: Groups, of: str = "observation", variances: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of new rows.

        The random effects are those that ``condition`` or ``refit`` found beside what the network gave then. A head
        does not see the weights of the network: where these have changed since, the effects belong to the former f and
        the predictions are wrong, without an error. Call ``condition`` again after each change of the network.

        A level of the training rows adds its predicted effects to f; a level of G without rows is predicted from the
        levels that it is correlated with; a level outside the vocabulary (code −1) adds nothing to the mean and its
        variance z'Gz to the variance (that of an average level where the levels differ).

        Args:
            output: What the network gives for the new rows.
            groups: Their levels; −1 for unknown ones.
            of: ``"observation"``: variance of a new y; ``"mean"``: of f + z'b, without σ².
            variances: Give variances; None in their place otherwise.

        Returns:
            (mean, variance), float64, each of shape (m,). The network and the thetas are taken as known.

        Raises:
            ValueError: The head was not conditioned, or its parameters or its offset have changed since.
        """
        if of not in ("observation", "mean"):
            raise ValueError(f"`predict` gives the variance of an 'observation' or a 'mean', got {of!r}.")
        known = self._ready()
        with torch.no_grad():
            f, X = self.fixed_part(output)
            terms = self.factors.terms(groups, len(f), unknown=True)
            mean = f + known.mean(terms, X)
            if not variances:
                return mean, None
            return mean, known.variance(terms, X) + (known.sigma2 if of == "observation" else 0.0)

    def scored(self, output: Tensor, y: Tensor, groups: Groups) -> dict[str, Tensor]:
        """What metrics take by keywords, of rows with a response: ``metrics.update(**head.scored(output, y, groups))``.

        Args:
            output: What the network gives for the rows.
            y: Their response.
            groups: Their levels; −1 for unknown ones.

        Returns:
            Each of shape (m,): ``preds`` and ``variance`` of ``predict`` for a new observation, ``target``, ``known``
            (whether all levels of a row are), ``fixed`` (f, or Xβ̂ of features), ``random_variance`` z'Gz, and
            ``residual_variance`` σ².

        Raises:
            ValueError: As of ``predict``, or the head was conditioned without variances.
        """
        require_pair(output, y)
        known = self._ready()
        with torch.no_grad():
            f, X = self.fixed_part(output)
            terms = self.factors.terms(groups, len(f), unknown=True)
            random = [term.effects.row_variance(term.codes, term.design) for term in terms]
            return {
                "preds": f + known.mean(terms, X),
                "target": y.reshape(-1).to(f),
                "variance": known.variance(terms, X) + known.sigma2,
                "known": torch.stack([term.codes >= 0 for term in terms]).all(0),
                "fixed": f + known.fixed(X),
                "random_variance": torch.stack(random).sum(0),
                "residual_variance": known.sigma2.expand(len(f)),
            }

    def refit(
        self, output: Tensor, y: Tensor, groups: Groups | Rows, variances: bool = True, **options: Any
    ) -> FitResult:
        """Fit the variance parameters to all rows by REML, the network being fixed, then ``condition``.

        Args:
            output: What the trained network gives for all training rows.
            y: Their response.
            groups: Their levels.
            variances: As of ``condition``.
            options: Further options of `openreml_nn.fit`, such as ``start="data"`` or ``max_steps``.

        Returns:
            The fit, which says that the output of the network is held, and has no AIC and BIC; the thetas of the head
            are its estimates afterwards.
        """
        r, X = self._all_rows(output, y)
        V = self._covariance_of(groups)
        solver = groups.choice.solver if isinstance(groups, Rows) else self.solver
        names = ["Intercept", *(f"phi{i}" for i in range(X.shape[1] - 1))][: X.shape[1]]
        given = {"start": "current", "solver": solver, "method": self.method, "x_names": names} | options
        known = "the network, which gives the features" if self.mode == "features" else "the output of the network"
        result = replace(fit(V, r, X, **given), given=known)
        self.posterior = self._given(V, r, X, variances)
        return result

    # ---- moving and saving -------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for what a conditioned head has saved, whose sizes are those of its data.

        A state of a head without it takes the present one away; a state without a head leaves it.

        Raises:
            ValueError: The state is of a head in mode ``"features"`` and this one is not, or the other way round.
        """
        at = f"{prefix}posterior."
        saved = {name: state_dict[at + name] for name in Posterior.BUFFERS if at + name in state_dict}
        device = self.residual.theta.device
        room = {name: torch.empty_like(value, device=device) for name, value in saved.items()}
        if len(room) == len(Posterior.BUFFERS):
            if (len(room["beta"]) > 0) != (self.mode == "features"):
                kinds = ["f", "features"] if self.mode == "features" else ["features", "f"]
                raise ValueError(
                    f"The state is of a head of a network that gives {kinds[0]}, and this one, in mode {self.mode!r}, "
                    f"takes {kinds[1]}. Give it the mode of the training."
                )
            self.posterior = Posterior(**room)
        elif f"{prefix}offset" in state_dict:
            self.posterior = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _ready(self) -> Posterior:
        """The random effects; a ValueError unless they are those of the present parameters."""
        known = self.posterior
        if known is None:
            raise ValueError("`predict` needs the training rows: call `condition` or `refit` first.")
        if not torch.equal(known.made_at, self._parameters_and_offset()):
            raise ValueError(
                "The thetas, other parameters of the covariances, or the offset have moved since `condition`: call it "
                "again."
            )
        return known

    def _parameters_and_offset(self) -> Tensor:
        """All that the random effects are predicted at, flat, float64."""
        with torch.no_grad():
            return torch.cat([part.to(torch.float64).flatten() for part in (*self.parameters(), self.offset)])

    def _given(self, V: Matrix, r: Tensor, X: Tensor, variances: bool) -> Posterior:
        return condition(V, r, X, self.factors.average_levels(), self._parameters_and_offset(), variances)

    def _all_rows(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """y − f and X without history, both finite."""
        r, X = self.left_over(output.detach(), y.detach() if isinstance(y, Tensor) else y)
        require_finite(output, y)
        return r, X
