"""Several tensors read at once."""

import numpy as np
import torch

from openreml_nn.optim.host import to_host


def test_shapes_and_values() -> None:
    parts = [torch.tensor(2.5, requires_grad=True), torch.arange(3), torch.eye(2, dtype=torch.float32), torch.zeros(0)]
    number, row, matrix, nothing = to_host(*parts)
    assert number.shape == ()
    assert float(number) == 2.5
    np.testing.assert_array_equal(row, [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(matrix, np.eye(2))
    assert nothing.shape == (0,)
    assert {x.dtype for x in (number, row, matrix, nothing)} == {np.dtype(np.float64)}
