"""V read as a·ZKZ' + b·I: which thetas make a and b, and how rows belong to what is reduced."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
)
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.solvers.spectral_form import (
    AllRows,
    FactorRows,
    KernelForm,
    LevelRows,
    Rows,
    kernel_form,
    scale_of,
    scaled,
)

N = 12
generator = torch.Generator().manual_seed(6)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ROOT = normal(5, 7)
K = ROOT @ ROOT.mT
Z = DummyMatrix(torch.arange(N) % 4, levels=range(5))
TWICE = ScalarMatrix(1)
KERNELS: dict[str, tuple[Matrix, list[int] | None]] = {
    "one variance": (KnownMatrix(K, TransformExp()), [0, 1]),
    "two variances": (KroneckerProduct(ScalarMatrix(1), KnownMatrix(K)), None),
    "one variance twice": (KroneckerProduct(TWICE, SimpleMatrix(K), TWICE), None),
    "a fixed kernel": (SimpleMatrix(K), None),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("residual_first", [False, True])
def test_scales(name: str, residual_first: bool) -> None:
    G, variances = KERNELS[name]
    terms: dict[str, Matrix] = {"g": CovariancePropagation(Z, G), "residual": ScalarMatrix(N)}
    V = Sum(dict(reversed(terms.items())) if residual_first else terms)
    form = kernel_form(V)
    assert isinstance(form, KernelForm)
    theta = normal(V.num_params)

    def by_hand(theta: Tensor) -> Tensor:
        whole = V.build(theta)  # rows 0 and 4 have one level
        a = whole[0, 4] / K[0, 0]
        return torch.stack([a, whole[0, 0] - whole[0, 4]])

    scales, J = form.scales(V, theta)
    np.testing.assert_allclose(scales, by_hand(theta), rtol=1e-12)
    np.testing.assert_allclose(J, torch.func.jacrev(by_hand)(theta), rtol=1e-12, atol=1e-12)
    assert form.variances == (variances and sorted(variances, reverse=residual_first))


def test_a_fixed_residual() -> None:
    V = Sum(g=KnownMatrix(torch.eye(3) + 1.0), residual=IdentityMatrix(3))
    form = kernel_form(V)
    assert isinstance(form, KernelForm)
    assert isinstance(form.rows, AllRows)
    scales, J = form.scales(V, torch.zeros(1, dtype=torch.float64))
    assert scales.tolist() == [1.0, 1.0]
    assert J.tolist() == [[2.0], [0.0]]
    assert form.variances is None


def test_one_variance_for_both() -> None:
    """Which is none of its own for either."""
    W, shared = normal(N, N), ScalarMatrix(N)
    V = Sum(g=CovariancePropagation(SimpleMatrix(W), shared), residual=shared)
    form = kernel_form(V)
    assert isinstance(form, KernelForm)
    theta = normal(1)
    scales, J = form.scales(V, theta)
    variance = theta.mul(2.0).exp().numpy()
    np.testing.assert_allclose(scales, variance.repeat(2), rtol=1e-12)
    np.testing.assert_allclose(J, 2.0 * variance.repeat(2)[:, None], rtol=1e-12)
    assert form.variances is None


FIXED: dict[str, Matrix] = {
    **{name: G for name, (G, _) in KERNELS.items()},
    "identity": IdentityMatrix(5),
    "scaled identity": ScalarMatrix(5),
    "product in a product": KroneckerProduct(TWICE, KroneckerProduct(KnownMatrix(K), ScalarMatrix(1))),
}


@pytest.mark.parametrize("G", FIXED.values(), ids=FIXED)
def test_scale_of_a_fixed_matrix(G: Matrix) -> None:
    theta = normal(G.num_params).requires_grad_()
    fixed = scaled(G)
    assert fixed is not None
    plain = torch.eye(5, dtype=torch.float64) if fixed.K is None else fixed.K
    torch.testing.assert_close(scale_of(G, theta) * plain, G.build(theta))
    if G.num_params:
        assert torch.autograd.gradcheck(lambda x: scale_of(G, x), theta)


CODES = torch.tensor([0, 3, 3, -1, 2, 0, 3, 5])
ROWS: dict[str, tuple[Rows, Tensor]] = {
    "all": (AllRows(8), torch.eye(8, dtype=torch.float64)),
    "levels": (LevelRows(CODES, None, 6), DummyMatrix(CODES.clamp(min=0), levels=range(6))() * (CODES >= 0)[:, None]),
    "slopes": (LevelRows(CODES.clamp(min=0), torch.arange(8.0), 6),
               KhatriRaoMatrix(torch.arange(8.0)[:, None], DummyMatrix(CODES.clamp(min=0), levels=range(6)))()),
    "one row each": (LevelRows(torch.tensor([2, 0, 1]), torch.tensor([1.0, -2.0, 1.0]), 3),
                     torch.tensor([[0.0, 0.0, 1.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    rows, design = ROWS[name]
    D = design.square().sum(0)
    S = (design / D.sqrt())[:, D > 0]
    v, c = normal(len(design), 2), normal(S.shape[1], 2)
    assert rows.size == S.shape[1]
    assert rows.orthonormal
    torch.testing.assert_close(rows.into(v), S.mT @ v)
    torch.testing.assert_close(rows.out(c), S @ c)
    torch.testing.assert_close(rows.rest(v), v - S @ (S.mT @ v))
    assert rows.complete == (S.shape[0] == S.shape[1])


def test_rows_of_a_factor() -> None:
    W = normal(6, 3)
    rows, v, c = FactorRows(W), normal(6, 2), normal(3, 2)
    torch.testing.assert_close(rows.into(v), W.mT @ v)
    torch.testing.assert_close(rows.out(c), W @ c)
    assert rows.rest(v) is v
    assert not rows.orthonormal


def test_rows_of_no_level() -> None:
    rows, v = LevelRows(torch.full((4,), -1), None, 3), normal(4, 2)
    assert rows.size == 0
    assert rows.into(v).shape == (0, 2)
    torch.testing.assert_close(rows.out(normal(0, 2)), torch.zeros_like(v))
    torch.testing.assert_close(rows.rest(v), v)
