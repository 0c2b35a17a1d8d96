"""What a fit gives: estimates with their standard errors, predictions, and how the fit ended."""

import math
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn import likelihood
from openreml_nn.covariance import Matrix
from openreml_nn.natural_scale import correlations, natural_covariance, natural_scale
from openreml_nn.new_rows import NewDesign, warn_of_new_levels
from openreml_nn.objectives import Objective
from openreml_nn.optim import Progress
from openreml_nn.optim.host import to_host
from openreml_nn.solvers import Evaluation
from openreml_nn.solvers.terms import operands_of
from openreml_nn.summary import aligned_text, variance_text
from openreml_nn.term_tables import BLUP_COLUMNS, TermTables


@dataclass(frozen=True)
class FitResult:
    """A fitted mixed model.

    Attributes:
        objective: The objective that was maximised, with V at the estimates.
        evaluation: The problem evaluated at the estimates.
        converged: Whether the fit ended at a maximum.
        reason: Why it ended.
        history: Progress after each step.
        theta_cov: Covariance of the raw thetas, shape (k, k): the inverse average information; NaN in rows of
            parameters that are fixed or on a boundary.
        held: For each raw theta −1 or 1 where it is on its lower or upper boundary, else 0.
        fixed: Indices of the raw thetas that were fixed.
        x_names: Names of the columns of X.
        seconds: Wall time of the fit.
        given: What part of the mean was taken as known, as "the output of a network", in words; ℓ is then that of the
            rest, and AIC and BIC are NaN, because the parameters of that part are not counted.
        sharing: How several processes shared the rows, in words. The tables are then whole on the first process; the
            others have their own levels of a term that is whole on one process each.
    """

    objective: Objective
    evaluation: Evaluation
    converged: bool
    reason: str
    history: list[Progress]
    theta_cov: np.ndarray
    held: tuple[int, ...]
    fixed: tuple[int, ...]
    x_names: list[str]
    seconds: float = field(default=math.nan, compare=False)
    sharing: str = field(default="", compare=False)
    given: str = field(default="", compare=False)

    def settle(self) -> None:
        """Ask the other processes, where there are any, for what the tables need, so that one can read them alone."""
        if self.evaluation.problem.ranks.size > 1:
            self._by_term.fill()

    # ---- numbers -----------------------------------------------------------------------------------------------------

    @property
    def V(self) -> Matrix:
        """The covariance of the observations."""
        return self.evaluation.problem.V

    @property
    def theta(self) -> Tensor:
        """Raw thetas at the end, shape (k,)."""
        return self.evaluation.theta.detach()

    @property
    def loglik(self) -> float:
        """ℓ, with its constants."""
        return float(self.objective.loglik(self.evaluation).detach())

    @property
    def n(self) -> int:
        """Number of observations."""
        return self.evaluation.problem.n

    @property
    def p(self) -> int:
        """Rank of X."""
        return self.evaluation.problem.p

    @property
    def n_iter(self) -> int:
        """Accepted steps."""
        return self.history[-1].iteration if self.history else 0

    @property
    def num_variance_parameters(self) -> int:
        """Variance parameters that were estimated, also those on a boundary."""
        return self.V.num_params - len(self.fixed)

    @property
    def AIC(self) -> float:
        """−2ℓ + 2 (p + number of variance parameters), as lme4."""
        return math.nan if self.given else -2.0 * self.loglik + 2.0 * (self.p + self.num_variance_parameters)

    @property
    def BIC(self) -> float:
        """−2ℓ + log(n) (p + number of variance parameters), as lme4."""
        penalty = math.log(self.n) * (self.p + self.num_variance_parameters)
        return math.nan if self.given else -2.0 * self.loglik + penalty

    # ---- fixed effects -----------------------------------------------------------------------------------------------

    @property
    def beta(self) -> Tensor:
        """Estimates of the fixed effects, for the columns of X that were kept, shape (p,)."""
        return likelihood.beta(self.evaluation)

    @property
    def beta_cov(self) -> Tensor:
        """Their covariance (X'V⁻¹X)⁻¹, shape (p, p)."""
        return likelihood.beta_cov(self.evaluation)

    @property
    def aliased(self) -> list[str]:
        """Columns of X that were dropped because they depend on columns to their left."""
        return [self.x_names[i] for i in self.evaluation.problem.fixed.aliased]

    @property
    def fixed_effects(self) -> pd.DataFrame:
        """Table of the fixed effects: name, estimate, std_error, z."""
        estimate = self.beta.cpu().numpy()
        se = self.beta_cov.diagonal().sqrt().cpu().numpy()
        names = [self.x_names[i] for i in self.evaluation.problem.fixed.kept]
        return pd.DataFrame({"name": names, "estimate": estimate, "std_error": se, "z": estimate / se})

    # ---- variance parameters -----------------------------------------------------------------------------------------

    @property
    def variance(self) -> pd.DataFrame:
        """Table of the variance parameters: name, estimate (natural scale), std_error, share, boundary, fixed.

        The share is that of the term in the average variance of an observation, in the term's first row; a term whose
        parameters are all those of another one counts to that. Standard errors are by the delta method from the
        average information, with thetas on a boundary taken as known. A parameter is on a boundary, and has none, where
        all its thetas are on one or fixed; where only some are, as in a covariance that is singular by a correlation
        of ±1, ``reason`` and the correlations of the summary tell it.
        """
        V, theta = self.V, self.theta
        estimate, se, own = natural_scale(V, theta, self.theta_cov, self.held)
        at = np.array([bool(h) for h in self.held], dtype=bool)
        fixed = np.zeros(len(theta), dtype=bool)
        fixed[list(self.fixed)] = True
        return pd.DataFrame(
            {
                "name": V.natural_names,
                "estimate": estimate,
                "std_error": se,
                "share": self._by_term.shares(),
                "boundary": (own & at).any(axis=1) & np.isnan(se),
                "fixed": own[:, fixed].any(axis=1) & ~own[:, ~fixed].any(axis=1),
            }
        )

    @property
    def variance_cov(self) -> np.ndarray:
        """Covariance of the estimates in `variance`, shape (m, m), on their scale; NaN where these have no error."""
        return natural_covariance(self.V, self.theta, self.theta_cov)

    @cached_property
    def _by_term(self) -> TermTables:
        return TermTables(self.evaluation)

    # ---- random effects ----------------------------------------------------------------------------------------------

    def blup(self, term: str | None = None) -> pd.DataFrame:
        """Predictions of the random effects: term, effect, level, blup, pev (prediction error variance).

        Args:
            term: Name of one term; all terms when left out.

        Raises:
            KeyError: V has no random term of this name.
        """
        terms = self._by_term.terms
        names = [t.name for t in terms]
        if term is not None and term not in names:
            raise KeyError(f"There is no random term {term!r}; there are {names}.")
        tables = [self._by_term.blup(t) for t in terms if term in (None, t.name)]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(BLUP_COLUMNS))

    def variance_beside(self, terms: Collection[str]) -> Tensor:
        """Variance of each observation of this process in all of V but these terms, shape (n,)."""
        operands = operands_of(self.V, self.theta)
        rest = [operand.diagonal(own).detach() for name, operand, own in operands if name not in terms]
        return torch.stack(rest).sum(0) if rest else self.theta.new_zeros(self.evaluation.problem.n_here)

    def predict(
        self,
        X: Tensor | NewDesign,
        Z: Mapping[str, Matrix] | None = None,
        unseen: Mapping[str, Matrix] | None = None,
    ) -> pd.DataFrame:
        """Predictions for new rows: prediction, std_error.

        The standard error is that of Xβ + Zu, without the residual; the ``sd`` beside the predictions of a network is
        that of a new observation, with it.

        Args:
            X: New rows as `openreml_nn.data.MixedModel.design` gives them, with their Z and unseen; or their design
                alone, with all columns of the fitted X, shape (m, number of columns).
            Z: Design of the new rows for each random term by name; a row of zeros for a new level, and a term that is
                left out adds nothing. Designs that are not where the fit is are copied there.
            unseen: The other way round: new levels at a level of the fit that has their variance, rows of zeros for
                levels of the fit. Without it a new level adds nothing to the standard error, which is warned of.

        Raises:
            TypeError: X is neither new rows nor a tensor, or Z or unseen is given beside new rows that have their own.
            ValueError: X has other columns than the fitted one, or a design is of no random term or has other rows.
        """
        if not isinstance(X, Tensor):
            if not all(hasattr(X, part) for part in ("X", "Z", "unseen")):
                raise TypeError(
                    f"`predict` needs new rows as `MixedModel.design` gives them, `predict(model.design(table))`, or "
                    f"their design X as a tensor, got {type(X).__name__}."
                )
            if Z is not None or unseen is not None:
                raise TypeError("`predict` takes new rows as a whole, `predict(new)`, or X, Z and unseen; not both.")
            Z, unseen, X = X.Z, X.unseen, X.X
        self._check_design(X, {**(unseen or {}), **(Z or {})})
        kept = self.evaluation.problem.fixed.kept
        Z, unseen = self._designs(Z), self._designs(unseen)
        bare = {name: design for name, design in Z.items() if name not in unseen}
        warn_of_new_levels(bare, self.evaluation.problem.ranks)
        mean, variance = to_host(*likelihood.predict(self.evaluation, X.to(self.theta)[:, kept], Z, unseen))
        return pd.DataFrame({"prediction": mean, "std_error": np.sqrt(variance.clip(min=0))})

    def _check_design(self, X: Tensor, Z: Mapping[str, Matrix]) -> None:
        """Refuse designs of other terms, of other rows or with other columns than those of the fit."""
        columns = self.p + len(self.evaluation.problem.fixed.aliased)
        if X.ndim != 2 or X.shape[1] != columns:
            raise ValueError(f"`predict` needs X of shape (m, {columns}), got {tuple(X.shape)}.")
        terms = [term.name for term in self._by_term.terms]
        for name, design in Z.items():
            if name not in terms:
                own = ", ".join(terms) or "none"
                raise ValueError(f"`predict` got a design of {name!r}; the random terms are {own}.")
            if design.shape[0] != len(X):
                raise ValueError(f"`predict` got {len(X)} rows of X and {design.shape[0]} of the design of {name!r}.")

    def _designs(self, given: Mapping[str, Matrix] | None) -> dict[str, Matrix]:
        """Designs where the fit is."""
        device = self.theta.device
        return {name: Z if Z.theta.device == device else deepcopy(Z).to(device) for name, Z in (given or {}).items()}

    # ---- text --------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The fit as a text: likelihood, how it ended, variance parameters, fixed effects."""
        ended = "Converged" if self.converged else "NOT CONVERGED"
        steps = f"after {self.n_iter} step{'s' * (self.n_iter > 1)}" if self.n_iter else "at the start values"
        criteria = f", AIC = {self.AIC:.2f}, BIC = {self.BIC:.2f}"
        held = [
            f"Fitted is what stands below; held is {self.given}.",
            "No AIC or BIC, as its parameters are not counted; no degrees of freedom are taken off for it.",
        ]
        lines = [
            f"Linear mixed model by {self.objective.method}{f', given {self.given}' if self.given else ''}",
            f"solver {self.objective.solver.name}: {self.objective.choice.reason}",
            *([self.sharing] if self.sharing else []),
            f"n = {self.n}, rank of X = {self.p}, variance parameters = {self.num_variance_parameters}",
            f"log-likelihood = {self.loglik:.4f}{'' if self.given else criteria}",
            f"{ended} {steps}: {self.reason}.",
            *(held if self.given else []),
            "",
            "Variance parameters",
            variance_text(self.variance, correlations(self.V, self.theta, self.held)),
            "",
            "Fixed effects",
            aligned_text(self.fixed_effects.rename(columns={"std_error": "std. error"})) if self.p else "  none",
        ]
        if self.aliased:
            lines.append(f"Aliased, dropped: {', '.join(self.aliased)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
