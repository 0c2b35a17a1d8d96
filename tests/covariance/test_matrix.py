"""The contract of `Matrix`: the examples and errors of its reference page, and what the design decides beyond it."""

import copy
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from openreml_nn.covariance import AR1Matrix, DiagonalMatrix, IdentityMatrix, Matrix, ScalarMatrix, UnconstrainedMatrix
from openreml_nn.covariance.transform import Transform, TransformExp

PARAMS = torch.tensor([0.0, 0.5, 1.0])


class Line(Matrix):
    """A structure as a user writes it: diag(a + b i)."""

    def __init__(self, n: int, trans: list[Transform] | None = None, **more: Any) -> None:
        super().__init__((n, n), ["a", "b"], trans, **more)

    def build(self, params: Tensor) -> Tensor:
        a, b = self.trans_params(params)
        return torch.diag_embed(a + b * torch.arange(self.shape[0], dtype=params.dtype))


class WithClosedForm(Line):
    def manual_grad(self, params: Any) -> tuple[Tensor | None, list[str]]:
        size = self.shape[0]
        return torch.full((2, size, size), 7.0), ["a", "b"]


def printed(tensor: Tensor, expected: str) -> bool:
    """Whether the tensor prints as the page shows it, spaces apart."""
    return re.sub(r"\s+", "", repr(tensor.detach())) == re.sub(r"\s+", "", expected)


# ---- the examples of the page ----------------------------------------------------------------------------------------


def test_intermediates_are_kept_and_forgotten() -> None:
    mat = DiagonalMatrix(3)
    mat.set_intermediates(PARAMS, {"sigma2": mat.trans_params(PARAMS)})
    assert printed(mat.get_intermediates(PARAMS)["sigma2"], "tensor([1.0000, 2.7183, 7.3891])")
    mat.reset_intermediates()
    assert mat.get_intermediates(PARAMS) is None


def test_set_no_grad_shortens_the_jacobian() -> None:
    mat = DiagonalMatrix(3)
    mat.set_no_grad(index=0)
    assert mat.no_grad_index == [0]
    J, names = mat.grad(torch.zeros(3))
    assert J is not None
    assert printed(
        J,
        "tensor([[[0., 0., 0.], [0., 2., 0.], [0., 0., 0.]], [[0., 0., 0.], [0., 0., 0.], [0., 0., 2.]]])",
    )
    assert names == ["sigma^2_1", "sigma^2_2"]


@pytest.mark.parametrize("call", ["auto_grad", "grad"])
def test_jacobian(call: str) -> None:
    J, names = getattr(DiagonalMatrix(2), call)(torch.tensor([0.0, 0.5]))
    assert printed(J, "tensor([[[2.0000, 0.0000], [0.0000, 0.0000]], [[0.0000, 0.0000], [0.0000, 5.4366]]])")
    assert names == ["sigma^2_0", "sigma^2_1"]


def test_names_for_reml() -> None:
    mat, theta = DiagonalMatrix(2), torch.tensor([0.0, 0.5])
    assert torch.equal(mat.map_theta_to_v(theta), mat(theta))
    J, expected = mat.map_theta_to_dv(theta), mat.grad(theta)[0]
    assert J is not None
    assert expected is not None
    assert torch.equal(J, expected)
    mat.set_no_grad([0, 1])
    assert mat.map_theta_to_dv(theta) is None
    assert mat.auto_grad(theta) == (None, [])


def test_properties() -> None:
    mat = Line(3, [TransformExp()])
    assert mat.shape == (3, 3)
    assert mat.param_names == ["a", "b"]
    assert mat.num_params == 2
    assert mat.trans == [TransformExp()]
    assert Line(3).trans is None
    assert mat.repr_dict == {"shape": (3, 3), "params": ["a", "b"]}
    mat.set_no_grad(1)
    assert repr(mat) == "Line(shape=(3, 3), params=['a', 'b'], fixed=['b'])"


# ---- the errors of the page ------------------------------------------------------------------------------------------


def test_matrix_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Matrix((1, 1), [])  # type: ignore[abstract]


def test_grad_mode() -> None:
    mat = WithClosedForm(2)
    J, _ = mat.grad(torch.zeros(2))
    assert J is not None
    assert bool((J == 7.0).all())
    mat.grad_mode = "auto"
    J, _ = mat.grad(torch.zeros(2))
    assert J is not None
    assert J[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    mat.grad_mode = "other"
    with pytest.raises(RuntimeError, match="'other'"):
        mat.grad(torch.zeros(2))


def test_manual_grad_is_optional() -> None:
    with pytest.raises(NotImplementedError, match="Line"):
        Line(2).manual_grad(torch.zeros(2))


# ---- decisions beyond the page ---------------------------------------------------------------------------------------


def test_nothing_is_added_to_a_diagonal() -> None:
    assert ScalarMatrix(2, start=1e-18)().diagonal().tolist() == pytest.approx([1e-18, 1e-18], rel=1e-12)


def test_dtype_is_that_of_the_parameters() -> None:
    mat = Line(2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert mat(torch.zeros(2, dtype=dtype)).dtype == dtype


def test_fixed_parameter_does_not_shift_labels() -> None:
    mat = DiagonalMatrix(3)
    mat.set_no_grad(1)
    J, names = mat.grad(torch.zeros(3))
    assert J is not None
    assert names == ["sigma^2_0", "sigma^2_2"]
    assert J[1].diagonal().tolist() == [0.0, 0.0, 2.0]
    assert mat.param_names == ["sigma^2_0", "sigma^2_1", "sigma^2_2"]


def test_cache_compares_values() -> None:
    mat = DiagonalMatrix(2)
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    mat.set_intermediates(a, "a")
    assert mat.get_intermediates(a.clone()) == "a"
    assert mat.get_intermediates(mat.to_param_dict(a)) == "a"
    assert mat.get_intermediates(b) is None, "the same values in another order"
    assert mat.get_intermediates(a.double()) is None, "another dtype"
    a += 1.0
    assert mat.get_intermediates(a) is None, "parameters changed in place"


def test_cache_of_a_matrix_without_parameters_is_a_no_op() -> None:
    mat = IdentityMatrix(2)
    mat.set_intermediates(torch.zeros(0), "kept")
    assert mat.get_intermediates(torch.zeros(0)) is None


def test_cache_is_in_no_copy() -> None:
    mat = DiagonalMatrix(2)
    mat.set_intermediates(torch.zeros(2), lambda: None)  # a pickle of this fails
    for twin in (copy.deepcopy(mat), pickle.loads(pickle.dumps(mat))):
        assert twin.get_intermediates(torch.zeros(2)) is None
    assert list(mat.state_dict()) == ["raw.sigma^2_0", "raw.sigma^2_1"]
    assert mat.get_intermediates(torch.zeros(2)) is not None


def test_first_call_without_gradient_leaves_no_constant() -> None:
    mat = AR1Matrix(3)
    with torch.no_grad():
        mat()
    for _ in range(2):
        mat.zero_grad()
        mat().sum().backward()
        assert all(p.grad is not None and p.grad.item() != 0.0 for p in mat.parameters())


def test_functional_call_replaces_thetas() -> None:
    mat = ScalarMatrix(2)
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    V = torch.func.functional_call(mat, {"raw.sigma^2": theta})
    assert torch.equal(V, mat(theta))
    V.sum().backward()
    assert theta.grad is not None


def test_a_fixed_matrix_takes_an_empty_tensor_or_dictionary() -> None:
    mat = IdentityMatrix(2)
    every: list[Any] = [None, {}, torch.zeros(0, dtype=torch.float64)]
    for given in every:
        assert mat(given).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert mat.grad(torch.zeros(0)) == (None, [])


def test_rescale_leaves_a_matrix_without_scale() -> None:
    V = UnconstrainedMatrix(2)
    assert torch.equal(V.rescale(torch.ones(4), 3.0), torch.full((4,), 3.0))
    assert torch.equal(IdentityMatrix(2).rescale(torch.zeros(0), 3.0), torch.zeros(0))


def test_moves_to_a_device(another_device: Callable[[], AbstractContextManager[torch.device]]) -> None:
    with another_device() as device:
        mat = AR1Matrix(4).to(device)
        V = mat()
        assert V.device == device
        V.sum().backward()
        assert all(p.grad is not None and p.grad.device == device for p in mat.parameters())
