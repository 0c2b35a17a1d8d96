"""The numbers of aA + bI against dense formulas, for a kernel over levels and for a factor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.kernel_equations import KernelData, KernelEquations
from openreml_nn.solvers.reductions import Reduction, reduce_factor, reduce_kernel

N, P = 24, 2
generator = torch.Generator().manual_seed(8)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


UE = torch.cat([torch.linalg.qr(normal(N, P))[0], normal(N, 1)], dim=1)
UE[:, P] -= UE[:, :P] @ (UE[:, :P].mT @ UE[:, P])
S = torch.linalg.qr(normal(N, 9))[0]
W = normal(9, 12)
EVERY = torch.eye(N, dtype=torch.float64)
KINDS = {
    "all rows": (EVERY @ torch.block_diag(W @ W.mT, torch.zeros(15, 15).double()) + 0.1 * EVERY, EVERY),
    "levels": (W @ W.mT, S),
    "factor": (None, normal(N, 9)),
}


def case(name: str, eigenvectors: bool) -> tuple[KernelData, Tensor]:
    """What the equations take, and A."""
    inner, F = KINDS[name]
    reduction: Reduction
    if inner is None:
        reduction, left, A = reduce_factor(F, eigenvectors=eigenvectors), UE, F @ F.mT
    else:
        reduction, left, A = reduce_kernel(inner, eigenvectors=eigenvectors), UE - F @ (F.mT @ UE), F @ inner @ F.mT
    C = reduction.rotate(F.mT @ UE).mT.contiguous().mT
    return KernelData(reduction, inner is not None, N - reduction.size, C, (left.mT @ left).numpy()), A


@pytest.mark.parametrize("eigenvectors", [False, True])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("a", "b"), [(0.7, 1.3), (1e-6, 2.0), (5.0, 0.01)])
def test_equals_dense(name: str, eigenvectors: bool, a: float, b: float) -> None:
    data, A = case(name, eigenvectors)
    ours = KernelEquations(data, a, b)
    U, e = UE[:, :P], UE[:, P]
    Vi = torch.linalg.inv(a * A + b * EVERY)
    M = U.mT @ Vi @ U
    R = Vi - Vi @ U @ torch.linalg.solve(M, U.mT @ Vi)
    Pe, APe = R @ e, A @ (R @ e)
    near = {"rtol": 1e-9, "atol": 1e-9}
    values = [-torch.logdet(Vi), torch.logdet(M), e @ Pe]
    np.testing.assert_allclose([ours.logdet_V, ours.logdet_M, ours.ePe], torch.stack(values), **near)
    np.testing.assert_allclose(-ours.z[:P], torch.linalg.solve(M, U.mT @ Vi @ e), **near)
    np.testing.assert_allclose(ours.M_inverse, torch.linalg.inv(M), **near)
    of_V, of_P = [(Vi * A).sum(), Vi.trace()], [(R * A).sum(), R.trace()]
    of_M = [both - alone for both, alone in zip(of_P, of_V, strict=True)]
    expected = torch.stack([*of_V, *of_M, -Pe @ APe, -Pe @ Pe]).view(3, 2)
    np.testing.assert_allclose(ours.jacobian(), expected, **near)
    pair = torch.stack([APe, Pe], dim=1)
    found, information = torch.from_numpy(ours.information()), pair.mT @ R @ pair
    unit = information.diagonal().sqrt()
    torch.testing.assert_close(found / unit / unit[:, None], information / unit / unit[:, None], **near)


def test_a_difference_saves_products_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it keeps its digits, and not where V is hardly any of the kernel."""
    data, _ = case("levels", False)
    products, times = list[int](), data.reduction.times

    def counted(x: Tensor) -> Tensor:
        products.append(x.shape[1])
        return times(x)

    monkeypatch.setattr(data.reduction, "times", counted)
    KernelEquations(data, 0.7, 1.3).jacobian()
    assert products == []
    KernelEquations(data, 1e-6, 2.0).jacobian()
    assert products == [P + 1]


@pytest.mark.parametrize("name", ["levels", "factor"])
@pytest.mark.parametrize("b", [0.0, -1.0])
def test_dimensions_that_the_kernel_does_not_reach_need_a_residual_variance(name: str, b: float) -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="residual"):
        KernelEquations(case(name, False)[0], 1.0, b)


def test_not_positive_definite() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="block"):
        KernelEquations(case("all rows", False)[0], -1.0, 1.0)
    assert np.isfinite(KernelEquations(case("all rows", False)[0], 1.0, 0.0).ePe)  # this kernel has no null space


@pytest.mark.parametrize("eigenvectors", [False, True])
def test_a_response_that_the_factor_fits_exactly(eigenvectors: bool) -> None:
    """e'Pe is a difference there, 1e-4 and 1e-18 of what it is taken from, and that is rounding."""
    data, A = case("factor", eigenvectors)
    F = KINDS["factor"][1]
    e = F @ torch.ones(9, dtype=torch.float64)
    e -= UE[:, :P] @ (UE[:, :P].mT @ e)
    both = torch.cat([UE[:, :P], e[:, None]], dim=1)
    C = data.reduction.rotate(F.mT @ both).mT.contiguous().mT
    exact = replace(data, C=C, E=(both.mT @ both).numpy())
    Vi = torch.linalg.inv(A + 1e-4 * EVERY)
    Pe = Vi @ e - Vi @ UE[:, :P] @ torch.linalg.solve(UE[:, :P].mT @ Vi @ UE[:, :P], UE[:, :P].mT @ Vi @ e)
    assert KernelEquations(exact, 1.0, 1e-4).ePe == pytest.approx(float(e @ Pe), rel=1e-8)
    for b in (1e-18, 1e-20, 1e-22, 1e-24):
        with pytest.raises(torch.linalg.LinAlgError, match=r"e'Pe = .* is rounding of .*: is y without"):
            KernelEquations(exact, 1.0, b)


@pytest.mark.parametrize("name", KINDS)
def test_a_response_beyond_floating_point(name: str) -> None:
    data, _ = case(name, False)
    scale = torch.tensor([1.0] * P + [1e160], dtype=torch.float64)
    E = torch.from_numpy(data.E) * scale[:, None] * scale
    with pytest.raises(torch.linalg.LinAlgError, match="e'Pe is not finite"):
        KernelEquations(replace(data, C=data.C * scale, E=E.numpy()), 1.0, 1.0)
    for a, b in ((np.inf, 1.0), (1.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(torch.linalg.LinAlgError, match="no finite variances"):
            KernelEquations(data, a, b)
