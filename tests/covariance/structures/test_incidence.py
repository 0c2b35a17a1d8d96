"""What all designs by level codes share: pairs of rows of one level, and rows left out."""

import pickle

import numpy as np
import pytest
import torch

from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KroneckerProduct,
    UnstructuredMatrix,
)
from openreml_nn.covariance.structures import IncidenceMatrix


@pytest.mark.parametrize("slopes", [False, True])
def test_pairs_of_one_level_agree_with_the_dense_sum(slopes: bool) -> None:
    """Many levels: only pairs of rows of one level are touched. Also after a call in inference mode, and a pickle."""
    factor = DummyMatrix(np.arange(40) % 21, levels=range(2, 21), unknown="zero")
    Z: IncidenceMatrix = factor
    G = DiagonalMatrix(19) if not slopes else KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(19))
    if slopes:
        Z = KhatriRaoMatrix(torch.randn(40, 2, dtype=torch.float64), factor)
    V = CovariancePropagation(Z, G)
    theta = torch.randn(V.num_params, dtype=torch.float64)
    A = Z()
    dense = A @ V.G(theta) @ A.mT
    with torch.inference_mode():
        torch.testing.assert_close(V.add_to(torch.zeros(40, 40, dtype=torch.float64), theta), dense)
    for twin in (V, pickle.loads(pickle.dumps(V))):
        leaf = theta.clone().requires_grad_()
        total = twin.add_to(torch.zeros(40, 40, dtype=torch.float64), leaf)
        torch.testing.assert_close(total.detach(), dense)
        total.square().sum().backward()
        assert leaf.grad is not None


def test_columns_and_rows_left_out() -> None:
    Z = KhatriRaoMatrix([[1.0, 5.0], [1.0, 6.0]], DummyMatrix(["b", "a"]))
    assert Z.labels == ["a", "b"]
    assert Z.columns(0).tolist() == [1, 0]
    assert Z.columns(1).tolist() == [3, 2]
    left = Z.where(torch.tensor([True, False]))
    assert left().tolist() == [[0.0, 1.0, 0.0, 5.0], [0.0] * 4]
    assert Z()[1].tolist() == [1.0, 0.0, 6.0, 0.0]
