"""Every transform on its whole domain: inverse, derivative, image; and what each refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openreml_nn.covariance.transform import (
    Transform,
    TransformChain,
    TransformExp,
    TransformExp2,
    TransformExp10,
    TransformExpPow2,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)

INF = math.inf
REAL = (-INF, INF)
POSITIVE = (0.0, INF)
EVERY: list[tuple[Transform, tuple[float, float], tuple[float, float]]] = [
    (TransformIdentity(), REAL, REAL),
    (TransformExp(), REAL, POSITIVE),
    (TransformExp2(), REAL, POSITIVE),
    (TransformExp10(), REAL, POSITIVE),
    (TransformExpPow2(), REAL, POSITIVE),
    (TransformPow(1), REAL, REAL),
    (TransformPow(3), REAL, REAL),
    (TransformPow(2), POSITIVE, POSITIVE),
    (TransformPow(0.5), POSITIVE, POSITIVE),
    (TransformPow(-1), POSITIVE, POSITIVE),
    (TransformPow(-0.5), POSITIVE, POSITIVE),
    (TransformScaleShift(), REAL, REAL),
    (TransformScaleShift(2.0, -3.0), REAL, REAL),
    (TransformScaleShift(-0.5, 1.0), REAL, REAL),
    (TransformSigmoid(), REAL, (0.0, 1.0)),
    (TransformSigmoid(-1.0, 1.0), REAL, (-1.0, 1.0)),
    (TransformSigmoid(-0.25, 1.0), REAL, (-0.25, 1.0)),
    (TransformChain([]), REAL, REAL),
    (TransformChain([TransformExp(), TransformScaleShift(2.0, 1.0)]), REAL, (1.0, INF)),
    (TransformChain([TransformScaleShift(-1.0), TransformExp()]), REAL, POSITIVE),
    (TransformChain([TransformExp(), TransformScaleShift(-2.0, 1.0)]), REAL, (-INF, 1.0)),
    (TransformChain([TransformSigmoid(1.0, 3.0), TransformPow(2)]), REAL, (1.0, 9.0)),
    (TransformChain([TransformScaleShift(1.0, -1.0), TransformPow(2)]), (1.0, INF), POSITIVE),
    (TransformChain([TransformChain([TransformPow(2)]), TransformScaleShift(1.0, 1.0)]), POSITIVE, (1.0, INF)),
    (TransformChain([TransformExp(), TransformPow(-1)]), REAL, POSITIVE),
]
each = pytest.mark.parametrize(("t", "domain", "image"), EVERY, ids=[repr(t) for t, _, _ in EVERY])


def inside(domain: tuple[float, float]) -> Tensor:
    """Points of the domain: near its end, and far into it."""
    x = torch.tensor([1e-6, 0.1, 0.5, 1.0, 2.0, 5.0, 12.0], dtype=torch.float64)
    return torch.cat([-x, x[:0].new_zeros(1), x]) if domain == REAL else domain[0] + x


@each
def test_domain_and_image(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    assert t.domain == pytest.approx(domain)
    assert t.image == pytest.approx(image)
    y = t.forward(inside(domain))
    assert bool(((y >= image[0]) & (y <= image[1])).all())


@each
def test_inverse(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    x = inside(domain)
    torch.testing.assert_close(t.inverse(t.forward(x)), x, rtol=1e-9, atol=1e-9)


@each
def test_monotone(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    steps = t.forward(inside(domain).sort().values).diff()
    assert bool((steps > 0).all()) or bool((steps < 0).all())


@each
def test_grad(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    x = inside(domain).requires_grad_()
    (slope,) = torch.autograd.grad(t(x).sum(), x)
    torch.testing.assert_close(t.grad(x.detach()), slope, rtol=1e-9, atol=1e-14)
    assert t.grad(x.detach()).shape == x.shape


@each
def test_float32_and_vmap(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    x = inside(domain)
    assert t.forward(x.float()).dtype == torch.float32
    torch.testing.assert_close(torch.func.vmap(t.forward)(x), t.forward(x))
    torch.testing.assert_close(torch.func.vmap(t.inverse)(t.forward(x)), t.inverse(t.forward(x)))


@each
def test_equality_and_text(t: Transform, domain: tuple[float, float], image: tuple[float, float]) -> None:
    assert eval(repr(t)) == t
    assert hash(eval(repr(t))) == hash(t)
    assert t != "something else"


@pytest.mark.parametrize(
    ("t", "y"),
    [
        (TransformExp(), 0.0),
        (TransformExp2(), -1.0),
        (TransformExp10(), -1.0),
        (TransformExpPow2(), 0.0),
        (TransformPow(2), -1.0),
        (TransformPow(-1), 0.0),
        (TransformSigmoid(-1.0, 1.0), 1.0),
        (TransformSigmoid(-1.0, 1.0), -1.5),
        (TransformChain([TransformExp(), TransformScaleShift(1.0, 2.0)]), 1.0),
    ],
)
def test_inverse_outside_the_image(t: Transform, y: float) -> None:
    with pytest.raises(ValueError, match=r"`Transform\w+\.inverse` needs .*, got"):
        t.inverse(torch.tensor([y], dtype=torch.float64))


@pytest.mark.parametrize("call", ["forward", "grad"])
@pytest.mark.parametrize(("power", "x"), [(2.0, -1.0), (0.5, -0.1), (-1.0, 0.0)])
def test_power_outside_its_domain(call: str, power: float, x: float) -> None:
    with pytest.raises(ValueError, match=f"for power {power:g}, got {x:g}"):
        getattr(TransformPow(power), call)(torch.tensor([1.0, x]))


def test_odd_power_of_negative_numbers_is_inverted() -> None:
    x = torch.tensor([-8.0, -1.0, 0.0, 27.0])
    torch.testing.assert_close(TransformPow(3).inverse(x), torch.tensor([-2.0, -1.0, 0.0, 3.0]))


def test_empty_chain_has_derivative_one() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(TransformChain([]).grad(x), torch.ones(2))
    assert torch.equal(TransformChain()(x), x)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TransformPow(0.0), ValueError),
        (lambda: TransformPow(INF), ValueError),
        (lambda: TransformScaleShift(0.0), ValueError),
        (lambda: TransformScaleShift(1.0, INF), ValueError),
        (lambda: TransformSigmoid(1.0, 1.0), ValueError),
        (lambda: TransformSigmoid(0.0, INF), ValueError),
        (lambda: TransformChain([TransformExp(), torch.exp]), TypeError),  # type: ignore[list-item]
    ],
)
def test_refused_arguments(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`Transform"):
        make()
