"""What the optimiser knows of the parameters of a V."""

import numpy as np
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    FactorAnalyticMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.optim import Geometry


def test_units_limits_and_names() -> None:
    Z = DummyMatrix([0, 1, 2] * 2)
    V = Sum(
        g=CovariancePropagation(Z, UnstructuredMatrix(3, start=[[4.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 4.0]])),
        serial=AR1Matrix(6),
        field=ExponentialMatrix(range(6)),
        residual=ScalarMatrix(6),
    )
    geometry = Geometry.of(V)
    columns = (geometry.names, geometry.units, geometry.finite_below, geometry.finite_above)
    names = {name: known for name, *known in zip(*columns, strict=True)}
    assert names["g/L_0_0"] == [1.0, True, False]
    assert names["g/L_1_0"] == [2.0, False, False]
    assert names["serial/sigma^2"] == [1.0, True, False]
    assert names["serial/rho"] == [1.0, True, True]
    assert names["field/range"] == [1.0, True, False]
    assert names["residual/sigma^2"] == [1.0, True, False]
    assert geometry.named([0, 2]) == "g/L_0_0, g/L_1_1"


def test_columns_of_a_cholesky_factor() -> None:
    V = Sum(residual=ScalarMatrix(3), g=UnstructuredMatrix(3))
    mirrors = {
        (name, other)
        for name, row in zip(Geometry.of(V).names, Geometry.of(V).mirrors, strict=True)
        for other, yes in zip(Geometry.of(V).names, row, strict=True)
        if yes
    }
    assert mirrors == {("g/L_0_0", "g/L_1_0"), ("g/L_0_0", "g/L_2_0"), ("g/L_1_1", "g/L_2_1")}


def test_a_column_with_the_other_sign_is_the_same_matrix() -> None:
    G = UnstructuredMatrix(4)
    theta = torch.randn(10, dtype=torch.float64)
    for diagonal, column in G.mirrors.items():
        flipped = theta.clone()
        flipped[column] *= -1.0
        flipped[diagonal] = theta[diagonal] = -40.0
        torch.testing.assert_close(G(flipped), G(theta))


def test_loadings_have_the_unit_of_their_scale() -> None:
    V = FactorAnalyticMatrix(3, start={"psi_0": 96.0, "psi_1": 96.0, "psi_2": 96.0, "lambda_0": 2.0, "lambda_1": 2.0,
                                       "lambda_2": 2.0})  # fmt: skip
    np.testing.assert_allclose(Geometry.of(V).units, [10.0, 10.0, 10.0, 1.0, 1.0, 1.0])


def test_fixed_parameters_are_left_out() -> None:
    V = Sum(residual=ScalarMatrix(3), g=UnstructuredMatrix(3))
    V.set_no_grad(param_name="g/L_1_0")
    geometry = Geometry.of(V)
    assert len(geometry.names) == len(geometry.units) == len(geometry.mirrors) == V.num_params - 1
    assert "g/L_1_0" not in geometry.names
    assert geometry.mirrors.sum() == 2


def test_plain() -> None:
    geometry = Geometry.plain(2)
    assert geometry.names == ["theta_0", "theta_1"]
    assert not any(known.any() for known in (geometry.finite_below, geometry.finite_above, geometry.mirrors))
