"""The loss of a head under ``torch.func``: a function of tensors alone, which looks at no value of them.

Transforms (``grad``, ``vmap``, ``jacfwd``, ``hessian``, …) go through a dense V, twice differentiable, m³ for m rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance import ScalarMatrix
from openreml_nn.nn.batch import BatchTerm, dense_V
from openreml_nn.solvers.gaussian_terms import GaussianTerms
from openreml_nn.solvers.watching import is_watched


def require_plain_levels(groups: Any) -> None:
    """Raise a ValueError where a transform maps over levels or designs of rows, or groups are ``head.rows(groups)``."""
    entries = list(groups.values()) if isinstance(groups, Mapping) else [groups]
    parts = [part for entry in entries for part in (entry if isinstance(entry, (tuple, list)) else [entry])]
    if not all(isinstance(x, Tensor) and not is_watched(x) for x in parts):
        raise ValueError(
            "`MixedModelHead` under `torch.func` needs the levels of rows as plain tensors, the same for all that "
            "`vmap` maps over: give them `in_dims=None`, or call the head outside of the transform."
        )


def dense_deviance(
    terms: list[BatchTerm], residual: ScalarMatrix, r: Tensor, X: Tensor, restricted: bool
) -> tuple[Tensor, int]:
    """As ``batch_deviance``, without a look at values; X is taken as of full rank.

    Args:
        terms: The factors.
        residual: σ² as a structure.
        r: Response, or what the network leaves of it, shape (m,).
        X: Fixed effects, shape (m, p); p may be 0.
        restricted: Whether to count the fixed effects.
    """
    sigma2 = residual.trans_params(residual.theta.to(r.dtype))[0]
    U = torch.linalg.qr(X)[0] if X.shape[1] else X
    e = r - U @ (U.mT @ r) if X.shape[1] else r
    logdet_V, logdet_M, quadratic = GaussianTerms.apply(dense_V(terms, sigma2, len(r)), U, e)[:3]
    return logdet_V + logdet_M + quadratic if restricted else logdet_V + quadratic, X.shape[1]
