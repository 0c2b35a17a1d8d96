"""Kernels on learned features: laws, formulas, gradients to the weights through REML, copies, predictions, errors."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openreml_nn import REML, fit
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    GaussianMatrix,
    Levels,
    Matrix,
    NeuralMatrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
)
from openreml_nn.covariance.structures import neural
from openreml_nn.likelihood import restricted_loglik
from openreml_nn.solvers import choose_solver
from openreml_nn.testing import check_matrix

KERNELS = ["linear", "gaussian", "exponential", "matern32", "matern52"]


def points(n: int, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(d: int = 2, m: int = 3, hidden: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, m)).double()


def rational_quadratic(r: Tensor) -> Tensor:
    return 1.0 / (1.0 + r.square())


class Mixed(nn.Module):
    """A correlation with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, r: Tensor) -> Tensor:
        share = self.weight.sigmoid().to(r.dtype)
        return share * torch.exp(-r) + (1.0 - share) * torch.exp(-r.square())


CASES: dict[str, Callable[[], NeuralMatrix]] = {
    **{kernel: functools.partial(lambda kernel: NeuralMatrix(points(5), network(), kernel), kernel)
       for kernel in KERNELS},
    "a function": lambda: NeuralMatrix(points(5), network(), rational_quadratic),
    "a function with weights": lambda: NeuralMatrix(points(5), network(), Mixed()),
    "more features than points": lambda: NeuralMatrix(points(4), network(m=6)),
    "points twice": lambda: NeuralMatrix(points(3)[[0, 1, 0, 2]], network(), "matern32"),
    "network in single precision": lambda: NeuralMatrix(points(5), network().float(), "matern52"),
    "images": lambda: NeuralMatrix(
        points(5, 16).reshape(5, 1, 4, 4), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()), "gaussian"
    ),
    "embedding of whole numbers": lambda: NeuralMatrix(torch.tensor([2, 0, 1, 2]), nn.Embedding(3, 2), "exponential"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    check_matrix(CASES[name](), definite=False, thetas=5)


def test_formulas() -> None:
    x, identity = points(5), nn.Identity()
    d = torch.cdist(x, x)
    unit = 0.5 * d[d > 0].median()
    torch.testing.assert_close(NeuralMatrix(x, identity, start=2.0)(), 2.0 * x @ x.mT)
    start = {"sigma^2": 2.0, "range": 1.5}
    r, root = d / (1.5 * unit), 3.0**0.5
    torch.testing.assert_close(
        NeuralMatrix(x, identity, "matern32", start=start)(), 2.0 * (1.0 + root * r) * torch.exp(-root * r)
    )
    root = 5.0**0.5
    torch.testing.assert_close(
        NeuralMatrix(x, identity, "matern52", start=start)(),
        2.0 * (1.0 + root * r + (root * r) ** 2 / 3.0) * torch.exp(-root * r),
    )


@pytest.mark.parametrize(("kernel", "same"), [("gaussian", GaussianMatrix), ("exponential", ExponentialMatrix)])
def test_without_weights_it_is_a_covariance_of_distance(kernel: str, same: type[Matrix]) -> None:
    K = NeuralMatrix(points(6), nn.Identity(), kernel)
    torch.testing.assert_close(K(), same(points(6))())  # both start at half the median distance


# ---- gradients to the weights ----------------------------------------------------------------------------------------


def model(kernel: str, levels: bool) -> tuple[Matrix, Tensor, Tensor]:
    """V, y and X: the kernel over 4 levels with 3 records each, or over 8 rows."""
    torch.manual_seed(3)
    n, q = (12, 4) if levels else (8, 8)
    K: Matrix = NeuralMatrix(points(q), network(m=2, hidden=3), kernel)
    if levels:
        K = CovariancePropagation(DummyMatrix(np.arange(n) % q), K)
    X = torch.stack([torch.ones(n), torch.linspace(-1.0, 1.0, n)], 1).double()
    return Sum(K=K, residual=ScalarMatrix(n, start=0.5)), torch.randn(n, dtype=torch.float64), X


@pytest.mark.parametrize("kernel", ["linear", "matern52"])
@pytest.mark.parametrize("solver", ["dense", "mixed_model_equations"])
def test_gradients_reach_the_weights(kernel: str, solver: str) -> None:
    V, y, X = model(kernel, levels=solver != "dense")
    objective = REML(V, solver)
    names = [name for name, _ in objective.named_parameters()]
    assert sum("network" in name for name in names) == 4

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(objective, dict(zip(names, values, strict=True)), (y, X))

    inputs = [p.detach().clone().requires_grad_() for p in objective.parameters()]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_solvers_agree(kernel: str) -> None:
    V, y, X = model(kernel, levels=True)
    results = []
    for solver in ("dense", "mixed_model_equations"):
        V.zero_grad()
        loss = REML(V, solver)(y, X)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in V.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_linear_features_with_final_weights_are_a_design() -> None:
    """Φ as a fixed Z with independent columns is the same V, for the solvers that work with m columns."""
    V, y, X = model("linear", levels=False)
    assert choose_solver(V).solver.name == "dense"
    K = V.operand("K")  # type: ignore[attr-defined]
    Phi = SimpleMatrix(K.features().detach())
    same = Sum(K=CovariancePropagation(Phi, ScalarMatrix(2)), residual=ScalarMatrix(8, start=0.5))
    assert choose_solver(same).solver.name == "spectral"
    for solver in ("spectral", "mixed_model_equations"):
        torch.testing.assert_close(REML(same, solver)(y, X), REML(V)(y, X))


def test_training() -> None:
    """A response smooth in |x|: Adam on weights and thetas, then `fit` on the thetas alone."""
    torch.manual_seed(0)
    n = 80
    x = torch.rand(n, 1, dtype=torch.float64) * 4.0 - 2.0
    y = torch.sin(4.0 * x[:, 0].abs()) + 0.3 * torch.randn(n, dtype=torch.float64)
    V = Sum(K=NeuralMatrix(x, network(1, 2, hidden=8), "gaussian"), residual=ScalarMatrix(n))
    before = fit(V, y)
    assert before.V.natural_names == ["K/sigma^2", "K/range", "residual/sigma^2"]
    weights = [p.detach().clone() for p in V.operand("K").network.parameters()]  # type: ignore[union-attr,operator]
    adam = torch.optim.Adam(V.parameters(), lr=0.02)
    problem = REML(V).prepare(y)
    for _ in range(150):
        adam.zero_grad()
        loss = -restricted_loglik(problem.evaluate())
        loss.backward()
        adam.step()
    moved = [p.detach().clone() for p in V.operand("K").network.parameters()]  # type: ignore[union-attr,operator]
    assert not any(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))
    after = fit(V, y, start="current")
    assert after.converged
    assert after.loglik > before.loglik + 5.0
    assert all(torch.equal(a, b) for a, b in zip(moved, V.operand("K").network.parameters(), strict=True))  # type: ignore


# ---- without the dense form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "matern32"])
def test_products_and_elements_do_not_form_the_matrix(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    K, rhs = NeuralMatrix(points(40), network(), kernel), points(40, 3)
    theta, dense = K.theta, K()
    rows, columns = torch.tensor([3, 39, 3]), torch.tensor([0, 7])
    shapes: list[tuple[int, ...]] = []
    between = NeuralMatrix._between

    def watched(self: NeuralMatrix, params: Tensor, left: Tensor, right: Tensor) -> Tensor:
        shapes.append((len(left), len(right)))
        return between(self, params, left, right)

    monkeypatch.setattr(neural, "ELEMENTS_AT_ONCE", 7 * 40)
    monkeypatch.setattr(NeuralMatrix, "_between", watched)
    monkeypatch.setattr(NeuralMatrix, "build", lambda *_: pytest.fail("V was formed"))
    torch.testing.assert_close(K.matmul(theta, rhs), dense @ rhs)
    torch.testing.assert_close(K.submatrix(theta, rows, columns), dense[rows][:, columns])
    torch.testing.assert_close(K.entries(theta, rows, rows.flip(0)), dense[rows, rows.flip(0)])
    torch.testing.assert_close(K.diagonal(theta), dense.diagonal())
    assert all(a <= 7 for a, _ in shapes)


# ---- copies and states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_state_makes_another_network_the_same(kernel: str) -> None:
    """Also where the other one began with other features, on which the unit of the range depends."""
    K, other = (NeuralMatrix(points(5), network(), kernel) for _ in range(2))
    K.set_theta(torch.tensor([0.3, -0.2][: K.num_params]))
    assert not torch.allclose(K(), other())
    file = io.BytesIO()
    torch.save(K.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(K(), other())


def test_copies_have_their_own_weights_and_gradients() -> None:
    K = NeuralMatrix(points(5), network(), "matern52")
    for twin in (copy.deepcopy(K), pickle.loads(pickle.dumps(K))):
        assert torch.equal(K(), twin())
        twin().sum().backward()
        assert all(p.grad is None for p in K.parameters())
        assert all(p.grad is not None for p in twin.parameters())


def test_the_weights_are_no_thetas() -> None:
    K = NeuralMatrix(points(5), network(), "matern52")
    assert K.param_names == ["sigma^2", "range"]
    K.set_no_grad([0, 1])
    assert all(p.requires_grad for p in K.network.parameters())
    K.network.requires_grad_(False)
    assert not K().requires_grad


# ---- new points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_cross(kernel: str) -> None:
    x, net = points(7), network()
    whole = NeuralMatrix(x, net, kernel)
    part = NeuralMatrix(x[:5], net, kernel)
    if part.unit is not None:
        part.unit.copy_(whole.unit)
    K = whole()
    torch.testing.assert_close(part.cross(x[5:]), K[5:, :5])
    torch.testing.assert_close(part.cross(x[5:], x[5:]), K[5:, 5:])
    torch.testing.assert_close(part.cross(x[5:], params=part.theta.detach()), K[5:, :5])


def test_prediction_at_new_points() -> None:
    """With known mean 0, K(x*, x) V⁻¹ y is the conditional mean of the joint normal distribution."""
    x, y, net = points(9), points(9, 1), network()
    K = NeuralMatrix(x[:6], net, "matern52")
    V = Sum(K=K, residual=ScalarMatrix(6, start=0.5))
    evaluation = REML(V).prepare(y[:6, 0], torch.zeros(6, 0, dtype=torch.float64)).evaluate()
    mean = K.cross(x[6:]) @ evaluation.Py
    joint = torch.cat([torch.cat([K() + 0.5 * torch.eye(6), K.cross(x[6:]).mT], 1),
                       torch.cat([K.cross(x[6:]), K.cross(x[6:], x[6:])], 1)])  # fmt: skip
    precision = torch.linalg.inv(joint + 1e-9 * torch.eye(9))
    expected = -torch.linalg.solve(precision[6:, 6:], precision[6:, :6] @ y[:6])[:, 0]
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_over_the_levels_of_a_term() -> None:
    make = functools.partial(NeuralMatrix, network=network(1), kernel="gaussian")
    K = make(Levels(["2001", "2003", "2010"], [2001.0, 2003.0, 2010.0]))
    assert K.shape == (3, 3)
    assert K.x.shape == (3, 1)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_network_that_fails_is_left_in_its_mode() -> None:
    net = nn.Linear(3, 2).double().eval()
    with pytest.raises(RuntimeError):
        NeuralMatrix([[0.0, 1.0]], net)
    assert not net.training


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)])
def test_a_network_that_is_no_function_of_its_inputs_is_refused(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="dropout and batch normalisation"):
        NeuralMatrix(points(5), net)


def test_the_mode_of_the_network_is_kept() -> None:
    net = network().eval()
    net[0].train()  # type: ignore[index]
    NeuralMatrix(points(5), net)
    assert [module.training for module in net.modules()] == [False, True, False, False]


@pytest.mark.parametrize(
    ("x", "net", "kernel", "error", "text"),
    [
        (points(5), len, "linear", TypeError, "`torch.nn.Module`, got builtin_function"),
        (points(5), network(), "rbf", ValueError, "no kernel 'rbf'; there are 'linear', 'exponential'"),
        (points(5), network(), 3, TypeError, "by name or as a function, got int"),
        (points(5), network(), torch.sin, ValueError, r"c\(0\) = 1, got 0"),
        (points(5), nn.Flatten(0), "linear", ValueError, r"features of shape \(5, m\) from its network, got \(10,\)"),
        (points(5), nn.LSTM(2, 3).double(), "linear", ValueError, "got tuple"),
        (torch.zeros(5, 2), nn.Identity(), "gaussian", ValueError, "two points with different features"),
        (points(1), nn.Identity(), "gaussian", ValueError, "two points with different features"),
        (torch.full((3, 1), torch.inf), nn.Identity(), "linear", ValueError, "not finite"),
        (torch.tensor(1.0), nn.Identity(), "linear", ValueError, r"inputs of shape \(n, …\)"),
        ([["a"], ["b"]], nn.Identity(), "linear", TypeError, "numeric values"),
    ],
)
def test_errors(x: Any, net: Any, kernel: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        NeuralMatrix(x, net, kernel)
