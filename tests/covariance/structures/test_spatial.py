"""Covariances of distance: formulas, units, coordinates."""

from typing import Any

import numpy as np
import pytest
import torch

from openreml_nn.covariance import AR1Matrix, ExponentialMatrix, GaussianMatrix


def test_formulas() -> None:
    x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    d = (x[:, None] - x).abs()
    torch.testing.assert_close(ExponentialMatrix(x, start=[2.0, 1.5])(), 2.0 * torch.exp(-d / 1.5))
    torch.testing.assert_close(GaussianMatrix(x, start=[2.0, 1.5])(), 2.0 * torch.exp(-((d / 1.5) ** 2)))


def test_exponential_over_integers_is_ar1() -> None:
    rho = 0.4
    expected = AR1Matrix([1, 2, 5], start=[2.0, rho])()
    torch.testing.assert_close(ExponentialMatrix([1, 2, 5], start=[2.0, -1.0 / np.log(rho)])(), expected)


def test_plane() -> None:
    V = ExponentialMatrix([[0.0, 0.0], [3.0, 4.0]], start=[1.0, 5.0])()
    assert V[0, 1].item() == pytest.approx(np.exp(-1.0))


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_default_start_does_not_depend_on_the_unit(unit: float) -> None:
    x = np.array([0.0, 1.0, 3.0, 4.5])
    torch.testing.assert_close(ExponentialMatrix(unit * x)(), ExponentialMatrix(x)())


def test_repeated_points_are_allowed() -> None:
    assert ExponentialMatrix([0.0, 0.0, 1.0])()[0, 1].item() == 1.0


@pytest.mark.parametrize("given", [[1.0], [2.0, 2.0]])
def test_needs_a_distance(given: Any) -> None:
    with pytest.raises(ValueError, match="two different points"):
        GaussianMatrix(given)


def test_natural_parameters() -> None:
    mat = GaussianMatrix([0.0, 1.0, 2.0], start=[2.0, 0.7])
    assert mat.natural_names == ["sigma^2", "range"]
    assert mat.natural(mat.theta).tolist() == pytest.approx([2.0, 0.7])
    assert mat.scale_powers == [1.0, 0.0]
