"""Small clustered data, heads over them, and what they should give by dense algebra."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    ExponentialMatrix,
    KnownMatrix,
    KroneckerProduct,
    UnstructuredMatrix,
)
from openreml_nn.nn import Effects, MixedModelHead
from openreml_nn.testing.kernels import random_kernel

ROWS = 48


def _codes(levels: int, seed: int) -> Tensor:
    return torch.randint(0, levels, (ROWS,), generator=torch.Generator().manual_seed(seed))


_T = torch.rand(ROWS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
_ONE = torch.ones_like(_T)
_SLOPES = torch.stack([_ONE, _T], dim=1)
_CURVES = torch.stack([_ONE, _T, _T.square()], dim=1)

# Effects and what the rows have of them; names say what is special.
CASES: dict[str, tuple[Callable[[], dict[str, Effects]], dict[str, Any]]] = {
    "intercepts": (lambda: {"a": Effects(7)}, {"a": _codes(7, 0)}),
    "slopes without intercepts": (lambda: {"a": Effects(7, ["t"])}, {"a": (_codes(7, 0), _T[:, None])}),
    "slopes": (lambda: {"a": Effects(7, ["intercept", "t"])}, {"a": (_codes(7, 0), _SLOPES)}),
    "curves": (lambda: {"a": Effects(7, ["intercept", "t", "t2"])}, {"a": (_codes(7, 0), _CURVES)}),
    "independent slopes": (
        lambda: {"a": Effects(7, ["intercept", "t"], DiagonalMatrix(2))}, {"a": (_codes(7, 0), _SLOPES)}),
    "own variances": (lambda: {"a": Effects(7, covariance=DiagonalMatrix(7))}, {"a": _codes(7, 0)}),
    "slopes with own scale": (
        lambda: {"a": Effects(7, ["intercept", "t"],
                              KroneckerProduct(UnstructuredMatrix(2), DiagonalMatrix(7)))},
        {"a": (_codes(7, 0), _SLOPES)}),
    "kernel": (lambda: {"a": Effects(7, covariance=KnownMatrix(random_kernel(7)))}, {"a": _codes(7, 0)}),
    "slopes over a kernel": (
        lambda: {"a": Effects(7, ["intercept", "t"],
                              KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(random_kernel(7))))},
        {"a": (_codes(7, 0), _SLOPES)}),
    "spatial": (
        lambda: {"a": Effects(7, covariance=ExponentialMatrix(torch.arange(14.0).reshape(7, 2)))},
        {"a": _codes(7, 0)}),
    "serial": (lambda: {"a": Effects(7, covariance=AR1Matrix(7))}, {"a": _codes(7, 0)}),
    "crossed": (lambda: {"a": Effects(7), "b": Effects(4)}, {"a": _codes(7, 0), "b": _codes(4, 1)}),
    "crossed, sparse": (lambda: {"a": Effects(40), "b": Effects(30)}, {"a": _codes(40, 0), "b": _codes(30, 1)}),
    "nested": (
        lambda: {"school": Effects(3), "class": Effects(9)},
        {"school": _codes(9, 2) // 3, "class": _codes(9, 2)}),
    "slopes, crossed, kernel": (
        lambda: {"line": Effects(5, covariance=KnownMatrix(random_kernel(5))), "a": Effects(7, ["intercept", "t"]),
                 "b": Effects(4)},
        {"line": _codes(5, 4), "a": (_codes(7, 0), _SLOPES), "b": _codes(4, 1)}),
}  # fmt: skip


@dataclass
class Case:
    """One of `CASES` with data, and what heads over it should give by dense algebra."""

    name: str
    f: Tensor
    y: Tensor
    groups: dict[str, Any]

    def head(self, **options: Any) -> MixedModelHead:
        """A head at thetas that are not zero, the same each time."""
        head = MixedModelHead(CASES[self.name][0](), **options)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p in head.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        return head

    def first(self, count: int) -> "Case":
        """The case with its first rows alone."""
        index = torch.arange(count)
        return Case(self.name, self.f.detach()[index].requires_grad_(), self.y[index], self.rows(index))

    def rows(self, index: Tensor) -> dict[str, Any]:
        """The levels of some rows."""
        return {name: tuple(part[index] for part in own) if isinstance(own, tuple) else own[index]
                for name, own in self.groups.items()}  # fmt: skip

    def loss(self, head: MixedModelHead) -> Tensor:
        """−log N(y; f, V) per row, by torch's own distribution."""
        V = head.covariance(self.groups)()
        return -torch.distributions.MultivariateNormal(self.f, V).log_prob(self.y) / len(self.y)

    def restricted_loss(self, head: MixedModelHead, phi: Tensor) -> Tensor:
        """−log density of the n − p contrasts K'y per row, K an orthonormal basis of what [1 φ] leaves."""
        X = torch.cat([torch.ones_like(phi[:, :1]), phi], dim=1)
        n, p = X.shape
        V = head.covariance(self.groups)()
        Vi = torch.linalg.inv(V)
        M = X.mT @ Vi @ X
        quadratic = self.y @ Vi @ (self.y - X @ torch.linalg.solve(M, X.mT @ Vi @ self.y))
        logdet = torch.logdet(V) + torch.logdet(M) - torch.logdet(X.mT @ X)
        return 0.5 * ((n - p) * math.log(2.0 * math.pi) + logdet + quadratic) / n


@pytest.fixture
def make() -> Callable[[str], Case]:
    """A case by its name."""

    def of(name: str) -> Case:
        f = torch.randn(ROWS, dtype=torch.float64, requires_grad=True)
        return Case(name, f, torch.randn(ROWS, dtype=torch.float64), CASES[name][1])

    return of


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make: Callable[[str], Case]) -> Case:
    """Each of the cases."""
    return make(request.param)
