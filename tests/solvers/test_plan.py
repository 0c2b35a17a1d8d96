"""Which operand plays which part."""

import numpy as np
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalPropagation,
    DummyMatrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
)
from openreml_nn.solvers.plan import Plan, is_scaled_diagonal

plot = np.arange(24)
FEW, MANY = DummyMatrix(plot % 3), DummyMatrix(plot // 2)


def test_the_largest_term_of_independent_levels_comes_first() -> None:
    few, many = (CovariancePropagation(Z, ScalarMatrix(Z.num_levels)) for Z in (FEW, MANY))
    plan = Plan.of(Sum(few=few, residual=ScalarMatrix(24), many=many))
    assert (plan.residual, plan.first, plan.first_index) == (1, MANY, 1)
    assert (plan.rest, plan.rest_index, plan.size_of_rest, plan.sparse) == ([FEW], [0], 3, True)
    serial = CovariancePropagation(MANY, AR1Matrix(12))
    plan = Plan.of(Sum(serial=serial, few=few, residual=ScalarMatrix(24)))
    assert (plan.first, plan.rest, plan.sparse) == (FEW, [MANY], False)
    plan = Plan.of(Sum(serial=serial, residual=ScalarMatrix(24)))
    assert (plan.first, plan.first_index, plan.size_of_rest) == (None, -1, 12)


def test_scaled_diagonals() -> None:
    weights = DiagonalPropagation(torch.ones(24, 1), ScalarMatrix(1))
    assert is_scaled_diagonal(weights)
    assert is_scaled_diagonal(ScalarMatrix(24))
    assert not is_scaled_diagonal(SimpleMatrix(torch.eye(24)))
