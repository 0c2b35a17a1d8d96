"""The precision of the prior: against the dense inverse, and what is computed once."""

from collections.abc import Callable

import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    UnstructuredMatrix,
)
from openreml_nn.nn import prior
from openreml_nn.nn.prior import KroneckerPrecision, LevelPrecision, Prior
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.testing.kernels import random_kernel

Q = 4


# name: (G, kind of its precision, factors that are inverted at each use)
CASES: dict[str, tuple[Callable[[], Matrix], type, int]] = {
    "variances": (lambda: DiagonalMatrix(Q), LevelPrecision, 1),
    "slopes": (lambda: KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(Q)), LevelPrecision, 1),
    "kernel": (lambda: KnownMatrix(random_kernel(Q)), KroneckerPrecision, 0),
    "AR(1)": (lambda: AR1Matrix(Q), KroneckerPrecision, 1),
    "slopes by kernel": (
        lambda: KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(random_kernel(Q))),
        KroneckerPrecision,
        1,
    ),
    "unstructured": (lambda: UnstructuredMatrix(2 * Q), KroneckerPrecision, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_inverse(case: str) -> None:
    make, kind, _ = CASES[case]
    G = make()
    G.set_theta(0.5 * torch.randn(G.num_params))
    got, s = Prior(G, Q).precision(G), G.shape[0] // Q
    assert isinstance(got, kind)
    P = torch.linalg.inv(G()).reshape(s, Q, s, Q)
    torch.testing.assert_close(got.logdet_G, torch.logdet(G()))
    blocks = torch.stack([P[:, level, :, level] for level in range(Q)])
    torch.testing.assert_close(got.blocks().expand(Q, s, s), blocks)
    x = torch.randn(Q, s, 3, dtype=torch.float64)
    torch.testing.assert_close(got.times(x), torch.einsum("albm,mbk->lak", P, x))


@pytest.mark.parametrize("case", CASES)
def test_fixed_factors_are_inverted_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = CASES[case][0]()
    given, cholesky, sizes = Prior(G, Q), prior.cholesky, []
    monkeypatch.setattr(prior, "cholesky", lambda K: sizes.append(len(K)) or cholesky(K))
    given.precision(G)
    assert len(sizes) == CASES[case][2]


def test_a_singular_kernel() -> None:
    M = torch.randn(Q, 2, dtype=torch.float64)
    with pytest.raises(NotPositiveDefinite, match="take the columns of W"):
        Prior(KnownMatrix(M @ M.mT), Q)
