"""A fixed tensor as a matrix."""

import numpy as np
import pytest
import torch

from openreml_nn.covariance import SimpleMatrix


def test_values_and_dtype() -> None:
    mat = SimpleMatrix(np.arange(6).reshape(2, 3))
    assert mat.shape == (2, 3)
    assert mat().dtype == torch.float64
    assert mat(torch.zeros(0)).dtype == torch.float32
    assert mat.param_names == []
    assert SimpleMatrix([[0.1]])().item() == 0.1


def test_the_tensor_travels_with_the_module() -> None:
    other = SimpleMatrix(torch.zeros(2, 2))
    other.load_state_dict(SimpleMatrix(torch.eye(2)).state_dict())
    assert other().tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_needs_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"two dimensions, got shape \(3,\)"):
        SimpleMatrix(torch.zeros(3))
