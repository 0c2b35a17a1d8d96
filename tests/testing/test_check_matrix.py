"""`check_matrix` finds each way in which a structure can be wrong, and names the law."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openreml_nn.covariance import AR1Matrix, Matrix, ScalarMatrix, UnconstrainedMatrix
from openreml_nn.covariance.matrix import Params
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.testing import LawBroken, check_matrix


class Sound(Matrix):
    """σ² I + τ² J of size 4, as a user writes it: names, transforms, one formula."""

    def __init__(self) -> None:
        super().__init__((4, 4), ["sigma^2", "tau^2"], [TransformExp()])

    def build(self, params: Tensor) -> Tensor:
        sigma2, tau2 = self.trans_params(params)
        return sigma2 * torch.eye(4, dtype=params.dtype, device=params.device) + tau2


def test_a_structure_in_ten_lines_keeps_every_law() -> None:
    check_matrix(Sound())


class OtherShape(Sound):
    def build(self, params: Tensor) -> Tensor:
        return super().build(params)[:3]


class OtherDtype(Sound):
    def build(self, params: Tensor) -> Tensor:
        return super().build(params.double())


class Asymmetric(Sound):
    def build(self, params: Tensor) -> Tensor:
        return super().build(params).tril()


class Indefinite(Sound):
    def build(self, params: Tensor) -> Tensor:
        return super().build(params) - 1.5 * torch.ones(4, 4, dtype=params.dtype)


class Changing(Sound):
    calls = 0

    def build(self, params: Tensor) -> Tensor:
        self.calls += 1
        return super().build(params) * (1.0 + 1e-6 * self.calls)


class OrderBlindCache(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.results: dict[float, Tensor] = {}

    def build(self, params: Tensor) -> Tensor:
        return self.results.setdefault(round(params.sum().item(), 9), super().build(params))


class CachedGraph(Sound):
    """Keeps what it computed for the same values: the first call decides whether there is a gradient."""

    def forward(self, params: Params | None = None) -> Tensor:
        flat = self.theta if params is None else self.from_param_dict(params)
        kept = self.get_intermediates(flat)
        if kept is None:
            kept = self.build(flat)
            self.set_intermediates(flat, kept)
        return kept


class WrongClosedForm(Sound):
    def manual_grad(self, params: Params) -> tuple[Tensor | None, list[str]]:
        J, names = self.auto_grad(params)
        return None if J is None else 2.0 * J, names


class ShiftedLabels(Sound):
    def manual_grad(self, params: Params) -> tuple[Tensor | None, list[str]]:
        J, names = self.auto_grad(params)
        return J, self.param_names[: len(names)][::-1]


class Detached(Sound):
    def build(self, params: Tensor) -> Tensor:
        sigma2, tau2 = self.trans_params(params)
        return sigma2 * torch.eye(4, dtype=params.dtype) + tau2.detach()


class NoForwardMode(Sound):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2.0 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2.0 * g

    def build(self, params: Tensor) -> Tensor:
        return self.Double.apply(super().build(params))


class NoSecondDerivative(AR1Matrix):
    def build(self, params: Tensor) -> Tensor:
        sigma2, rho = self.trans_params(params)
        return (sigma2 * rho ** self.lags.to(params.dtype))[self.lag_index]


class WrongProduct(Sound):
    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return super().matmul(params, rhs) + 1e-6


class WrongTransposedProduct(UnconstrainedMatrix):
    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.build(params) @ rhs


class WrongAddition(Sound):
    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        return out.add_(self.build(params.detach()))


class WrongSubmatrix(Sound):
    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.build(params)[columns][:, rows].mT * (rows[:, None] != columns)


class WrongDiagonal(Sound):
    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params)[:1].expand(4)


class NotDiagonal(Sound):
    @property
    def is_diagonal(self) -> bool:
        return True


class WrongBlocks(ScalarMatrix):
    def level_blocks(self, params: Tensor, count: int) -> Tensor | None:
        return self.trans_params(params).expand(count, self.shape[0] // count, self.shape[0] // count)


class WrongCommonBlock(ScalarMatrix):
    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        return torch.eye(self.shape[0] // count, dtype=params.dtype)


class WrongSandwichDiagonal(Sound):
    def sandwich_diagonal(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        return inner.diagonal(inner_params)


class WrongSandwich(Sound):
    def sandwich(self, params: Tensor, inner: Matrix, inner_params: Tensor) -> Tensor:
        return self.build(params) @ inner.build(inner_params)


class ShortNatural(Sound):
    def natural(self, params: Tensor) -> Tensor:
        return self.trans_params(params)[:1]


class WrongScale(Sound):
    @property
    def scale_powers(self) -> list[float]:
        return [1.0, 0.0]


class WrongSlope(TransformExp):
    def grad(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class WrongTransGrad(Sound):
    def __init__(self) -> None:
        Matrix.__init__(self, (4, 4), ["sigma^2", "tau^2"], [WrongSlope()])


class StaysOnTheCPU(Sound):
    def build(self, params: Tensor) -> Tensor:
        sigma2, tau2 = self.trans_params(params)
        return sigma2 * torch.eye(4, dtype=params.dtype) + tau2


class HiddenParameter(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.extra = [nn.Parameter(torch.zeros(1, dtype=torch.float64))]

    def theta_parameters(self) -> list[nn.Parameter]:
        return super().theta_parameters()[:1] + self.extra


class IgnoresFixing(Sound):
    @property
    def no_grad_index(self) -> list[int]:
        return []


class CarriesItsCache(Sound):
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


class CacheInState(Sound):
    def set_intermediates(self, params: Params, intermediates: Any) -> None:
        super().set_intermediates(params, intermediates)
        self.register_buffer("kept", torch.zeros(1))


class NoCopies(Sound):
    def __deepcopy__(self, memo: Any) -> "NoCopies":
        return self


class TakesAnyDictionary(Sound):
    def from_param_dict(self, param_dict: Params) -> Tensor:
        if isinstance(param_dict, dict):
            return torch.cat([param_dict.get(name, torch.zeros(1)) for name in self.param_names])
        return super().from_param_dict(param_dict)


class HidesCasts(Sound):
    def _apply(self, fn: Any, recurse: bool = True) -> "HidesCasts":
        return self


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (OtherShape, "`shape`"),
        (OtherDtype, "dtype"),
        (Asymmetric, "symmetric"),
        (Indefinite, "positive definite"),
        (Changing, "pure"),
        (OrderBlindCache, "pure"),
        (CachedGraph, "earlier calls"),
        (WrongClosedForm, "`grad` is the derivative"),
        (ShiftedLabels, "`grad` is the derivative"),
        (Detached, "`grad` is the derivative|with its gradient"),
        (NoForwardMode, "`grad`|`torch.func`"),
        (lambda: NoSecondDerivative(3), "second derivatives"),
        (WrongProduct, "`matmul`"),
        (WrongAddition, "`add_to`"),
        (WrongSubmatrix, "`submatrix`"),
        (WrongDiagonal, "`diagonal`"),
        (NotDiagonal, "`is_diagonal`"),
        (lambda: WrongBlocks(4), "`level_blocks`"),
        (lambda: WrongCommonBlock(4), "`common_block`"),
        (WrongSandwich, "`sandwich`"),
        (WrongSandwichDiagonal, "`sandwich` and its diagonal"),
        (ShortNatural, "`natural`"),
        (WrongScale, "`rescale`"),
        (WrongTransGrad, "`trans_grad`"),
        (HiddenParameter, "names, thetas"),
        (IgnoresFixing, "`no_grad_index`"),
        (CarriesItsCache, "copies"),
        (CacheInState, "`state_dict`"),
        (NoCopies, "copies"),
        (TakesAnyDictionary, "dictionary"),
        (HidesCasts, "`float\\(\\)`"),
        (StaysOnTheCPU, "devices"),
    ],
)
def test_a_broken_law_is_found_and_named(make: Any, law: str) -> None:
    with pytest.raises(LawBroken, match=f"breaks the law: .*({law})"):
        check_matrix(make(), thetas=4)


def test_products_of_a_rectangle() -> None:
    with pytest.raises(LawBroken, match="`rmatmul`"):
        check_matrix(WrongTransposedProduct(2), covariance=False, thetas=2)


def test_the_message_says_where_and_by_how_much() -> None:
    expected = r"`WrongProduct` breaks the law: .* At raw theta \(sigma\^2 = 0, tau\^2 = 0\): `matmul` is off by 1e-06"
    with pytest.raises(LawBroken, match=expected):
        check_matrix(WrongProduct())


class ExponentialDecay(Matrix):
    """V_ij = σ² exp(−|i − j| / length), without saying that the length is no variance."""

    def __init__(self) -> None:
        super().__init__((4, 4), ["sigma^2", "length"], [TransformExpPow2(), TransformExp()])

    def build(self, params: Tensor) -> Tensor:
        sigma2, length = self.trans_params(params)
        i = torch.arange(4, dtype=params.dtype, device=params.device)
        return sigma2 * torch.exp(-(i[:, None] - i).abs() / length)


class DecayWithScale(ExponentialDecay):
    @property
    def scale_powers(self) -> list[float]:
        return [1.0, 0.0]


def test_a_positive_parameter_that_is_no_variance_needs_scale_powers() -> None:
    with pytest.raises(LawBroken, match=r"Override the property `scale_powers`, here \[1.0, 1.0\]: .* 0 for .* length"):
        check_matrix(ExponentialDecay(), thetas=2)
    check_matrix(DecayWithScale(), thetas=2)


def test_an_unconstrained_matrix_is_no_covariance() -> None:
    with pytest.raises(LawBroken, match="symmetric"):
        check_matrix(UnconstrainedMatrix(2), thetas=2)
    check_matrix(UnconstrainedMatrix(2), covariance=False, thetas=2)


def test_the_matrix_is_left_as_it_was() -> None:
    V = AR1Matrix(3, start=[2.0, 0.5])
    V.set_no_grad(1)
    V.set_intermediates(V.theta, "kept")
    theta = V.theta.detach().clone()
    check_matrix(V, thetas=2)
    assert torch.equal(V.theta, theta)
    assert V.no_grad_index == [1]
    assert V.get_intermediates(V.theta) == "kept"
    assert all(p.grad is None for p in V.parameters())


@pytest.mark.gpu
def test_on_a_device() -> None:
    check_matrix(AR1Matrix(3).to("cuda"), thetas=3)
