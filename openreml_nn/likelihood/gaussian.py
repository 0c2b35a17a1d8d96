"""The Gaussian log-likelihoods, each once, on an evaluation."""

import math

from torch import Tensor

from openreml_nn.solvers import Evaluation


def restricted_loglik(evaluation: Evaluation) -> Tensor:
    r"""ℓ = −½ [(n − p) log 2π + log|V| + log|X'V⁻¹X| + y'Py], with the constant, as lme4 reports it.

    Source: Patterson & Thompson (1971), Biometrika 58, 545-554; Harville (1974), Biometrika 61, 383-385.
    """
    constant = (evaluation.problem.n - evaluation.problem.p) * math.log(2.0 * math.pi)
    return -0.5 * (constant + evaluation.logdet_V + evaluation.logdet_XtViX + evaluation.yPy)


def full_loglik(evaluation: Evaluation) -> Tensor:
    r"""ℓ = −½ [n log 2π + log|V| + y'Py]: the log-likelihood, β replaced by its maximum likelihood estimate."""
    constant = evaluation.problem.n * math.log(2.0 * math.pi)
    return -0.5 * (constant + evaluation.logdet_V + evaluation.yPy)
