"""Small symmetric matrices of information."""

import math

import numpy as np
import pytest

from openreml_nn.optim.curvature import among, condition, confounded, embedded, newton_decrement

H = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
G = np.array([1.0, -1.0, 2.0])


def test_newton_decrement() -> None:
    assert newton_decrement(H, G) == pytest.approx(G @ np.linalg.solve(H, G), rel=1e-12)
    units = np.array([1e6, 1.0, 1e-6])
    assert newton_decrement(H * np.outer(units, units), G * units) == pytest.approx(newton_decrement(H, G), rel=1e-12)
    assert newton_decrement(H[:0, :0], G[:0]) == 0.0
    assert newton_decrement(np.diag([1.0, 0.0, 1.0]), G) == math.inf
    assert newton_decrement(np.zeros((3, 3)), np.zeros(3)) == 0.0


def test_confounded_names_every_pair() -> None:
    pair = np.ones((2, 2))
    zero = np.zeros((2, 2))
    assert confounded(np.block([[pair, zero], [zero, pair]])).tolist() == [0, 1, 2, 3]
    assert confounded(np.block([[pair, zero], [zero, np.eye(2)]])).tolist() == [0, 1]
    assert confounded(H).tolist() == []
    assert confounded(np.diag([1.0, 0.0])).tolist() == [1]


def test_parts() -> None:
    where = np.array([True, False, True])
    assert among(H, where).tolist() == [[2.0, 0.0], [0.0, 5.0]]
    assert embedded(np.array([1.0, 2.0]), where).tolist() == [1.0, 0.0, 2.0]


def test_condition() -> None:
    assert condition(np.diag([1.0, 4.0, 100.0])) == pytest.approx(100.0)
    assert condition(np.diag([1.0, 0.0])) == math.inf
    assert condition(H[:0, :0]) == 1.0
