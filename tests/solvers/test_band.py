"""A symmetric matrix to a band and back, the band's factor and its products, against dense algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn.solvers import band
from openreml_nn.solvers.band import BandFactor, band_times, bandwidth_for, reduce_to_band

generator = torch.Generator().manual_seed(5)


def symmetric(n: int) -> Tensor:
    W = torch.randn(n, n + 2, generator=generator, dtype=torch.float64)
    return W @ W.mT / max(n, 1)


def dense_of(B: np.ndarray) -> Tensor:
    """The matrix of LAPACK's lower band storage."""
    n = B.shape[1]
    lower = sum((np.diag(row[: n - i], -i) for i, row in enumerate(B[1:], start=1)), np.zeros((n, n)))
    return torch.from_numpy(lower + lower.T + np.diag(B[0]))


@pytest.mark.parametrize(("n", "w"), [(1, 0), (2, 1), (3, 1), (9, 1), (9, 3), (10, 4), (40, 7), (40, 39)])
@pytest.mark.parametrize("block", [4, 1024])
def test_reduction(n: int, w: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A = Q B Q' with Q orthogonal, also where columns are updated block by block; the upper triangle is not read."""
    monkeypatch.setattr(band, "BLOCK", block)
    A = symmetric(n)
    given = A.tril() + torch.full((n, n), torch.nan).triu(1)
    B, panels = reduce_to_band(given, w)
    assert B.shape == (w + 1, n)
    QtAQ, Q = A.clone(), torch.eye(n, dtype=torch.float64)
    for panel in panels:
        panel.apply(QtAQ, True)
        panel.apply(Q, True)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(QtAQ @ Q.mT, dense_of(B))


@pytest.mark.parametrize("transpose", [False, True])
def test_a_few_columns(transpose: bool) -> None:
    _, panels = reduce_to_band(symmetric(12), 3)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    few = x.clone().numpy()
    for panel in panels:
        panel.apply(x, transpose)
        panel.apply_to_few(few, transpose)
    np.testing.assert_allclose(few, x, rtol=1e-13, atol=1e-13)


def test_columns_of_zeros() -> None:
    """Reflections of nothing: τ = 0."""
    A = torch.diag(torch.arange(12.0, dtype=torch.float64))
    B, panels = reduce_to_band(A.clone(), 2)
    Q = torch.eye(12, dtype=torch.float64)
    for panel in panels[::-1]:
        panel.apply(Q, False)
    torch.testing.assert_close(Q @ dense_of(B) @ Q.mT, A)


@pytest.mark.parametrize("n", [1, 2, 33, 2999, 3000, 6000])
def test_bandwidth(n: int) -> None:
    assert 0 <= bandwidth_for(n) < n
    assert bandwidth_for(n) <= bandwidth_for(n + 1)


@pytest.mark.parametrize(("n", "w"), [(1, 0), (5, 0), (5, 1), (40, 33)])
@pytest.mark.parametrize("m", [0, 1, 3])
def test_factor_and_products(n: int, w: int, m: int) -> None:
    B, _ = reduce_to_band(symmetric(n), w)
    A, x = dense_of(B), torch.randn(n, m, generator=generator, dtype=torch.float64)
    factor = BandFactor(B.copy(order="F"))
    assert factor.logdet == pytest.approx(float(torch.logdet(A)), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(factor.solve(x), torch.linalg.solve(A, x))
    torch.testing.assert_close(band_times(B, x), A @ x)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_not_positive_definite(value: float) -> None:
    B, _ = reduce_to_band(symmetric(6), 2)
    B[0, 3] = value
    with pytest.raises(torch.linalg.LinAlgError, match="block"):
        BandFactor(B)
