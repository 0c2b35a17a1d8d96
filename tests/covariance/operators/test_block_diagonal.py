"""Block diagonal: equal, ragged and rectangular blocks."""

import torch

from openreml_nn.covariance import BlockDiagonal, ScalarMatrix, UnconstrainedMatrix


def test_formula() -> None:
    A, B = torch.ones(2, 1), torch.full((1, 2), 2.0)
    assert BlockDiagonal(A, B)().tolist() == [[1, 0, 0], [1, 0, 0], [0, 2, 2]]


def test_diagonal_only_if_all_are_square_and_diagonal() -> None:
    assert BlockDiagonal(ScalarMatrix(2), ScalarMatrix(1)).is_diagonal
    assert not BlockDiagonal(ScalarMatrix(2), UnconstrainedMatrix(1)).is_diagonal
