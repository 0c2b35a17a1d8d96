"""σ² K: what is accepted as K, and what is said when it is not."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import KnownMatrix
from openreml_nn.covariance.structures.known import check_kernel

K = [[2.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("given", [K, np.array(K), torch.tensor(K), pd.DataFrame(K, index=["a", "b"])])
def test_forms(given: Any) -> None:
    V = KnownMatrix(given, start=3.0)()
    assert V.dtype == torch.float64
    torch.testing.assert_close(V, 3.0 * torch.tensor(K, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.ones((2, 3)), r"square and not empty, got shape \(2, 3\)"),
        (np.ones(2), "square"),
        (np.ones((0, 0)), "not empty"),
        ([[1.0, np.nan], [np.nan, 1.0]], "missing or infinite"),
        ([[1.0, 0.5], [0.4, 1.0]], "symmetric; .* 0.1"),
        ([[1.0, 2.0], [2.0, 1.0]], "positive semi-definite; its smallest eigenvalue is -1"),
    ],
)
def test_errors(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        KnownMatrix(given)


def test_a_singular_kernel_is_taken_as_it_is() -> None:
    """A centred K has the eigenvalue 0; nothing is added to its diagonal."""
    M = torch.randn(6, 20, dtype=torch.float64)
    M = M - M.mean(0)
    centred = M @ M.mT
    torch.testing.assert_close(KnownMatrix(centred)(), centred, rtol=1e-14, atol=1e-14)
    assert KnownMatrix(torch.zeros(2, 2))().abs().sum().item() == 0.0


def test_rounding_is_forgiven_and_made_symmetric() -> None:
    A = torch.tensor(K, dtype=torch.float64)
    A[0, 1] += 1e-12
    fixed = check_kernel(A)
    assert torch.equal(fixed, fixed.mT)


def test_small_units() -> None:
    torch.testing.assert_close(KnownMatrix(1e-12 * torch.tensor(K, dtype=torch.float64))().sum().item(), 4e-12)
    with pytest.raises(ValueError, match="semi-definite"):
        KnownMatrix([[1e-12, 2e-12], [2e-12, 1e-12]])


def test_the_kernel_is_data() -> None:
    assert list(KnownMatrix(K).state_dict()) == ["raw.sigma^2"]
    assert KnownMatrix(K).param_names == ["sigma^2"]
