"""Matrices with free entries."""

import torch

from openreml_nn.covariance import Gram, LowerTriangularMatrix, UnconstrainedMatrix


def test_entries_row_by_row() -> None:
    assert UnconstrainedMatrix(2, 3)(torch.arange(6.0)).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert LowerTriangularMatrix(2)(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert UnconstrainedMatrix(1, 2).param_names == ["a_0_0", "a_0_1"]
    assert LowerTriangularMatrix(2).param_names == ["l_0_0", "l_1_0", "l_1_1"]


def test_start() -> None:
    assert UnconstrainedMatrix(2, start=[[1.0, 2.0], [3.0, 4.0]])().tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_factor_gives_a_covariance() -> None:
    L = LowerTriangularMatrix(2, start=[2.0, 1.0, 3.0])
    assert Gram(L)().tolist() == [[4.0, 2.0], [2.0, 10.0]]
