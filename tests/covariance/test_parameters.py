"""Names, raw thetas, transforms, fixed parameters and start values: the reference page, and what goes beyond it."""

import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openreml_nn.covariance import AR1Matrix, DiagonalMatrix, Matrix, ScalarMatrix, UnconstrainedMatrix
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2, TransformScaleShift

PARAMS = torch.tensor([0.0, 0.5, 1.0])


def printed(tensor: Tensor, expected: str) -> bool:
    """Whether the tensor prints as the page shows it, spaces apart."""
    return re.sub(r"\s+", "", repr(tensor.detach())) == re.sub(r"\s+", "", expected)


class Named(Matrix):
    def build(self, params: Tensor) -> Tensor:
        return params[:, None]


def test_from_param_dict() -> None:
    given = {"sigma^2_0": torch.tensor([0.0]), "sigma^2_1": torch.tensor([0.5]), "sigma^2_2": torch.tensor([1.0])}
    assert printed(DiagonalMatrix(3).from_param_dict(given), "tensor([0.0000, 0.5000, 1.0000])")


def test_to_param_dict() -> None:
    given = DiagonalMatrix(3).to_param_dict(PARAMS)
    assert list(given) == ["sigma^2_0", "sigma^2_1", "sigma^2_2"]
    assert [repr(value) for value in given.values()] == ["tensor([0.])", "tensor([0.5000])", "tensor([1.])"]
    assert DiagonalMatrix(3).to_param_dict(given) == given


def test_trans_params_and_trans_grad() -> None:
    mat = DiagonalMatrix(3)
    assert printed(mat.trans_params(PARAMS), "tensor([1.0000, 2.7183, 7.3891])")
    assert printed(mat.trans_grad(PARAMS), "tensor([ 2.0000,  5.4366, 14.7781])")


def test_check_params_returns_device_and_dtype() -> None:
    assert DiagonalMatrix(3).check_params(PARAMS) == (torch.device("cpu"), torch.float32)
    assert ScalarMatrix(3).check_params({"sigma^2": torch.zeros(1, dtype=torch.float64)})[1] == torch.float64


@pytest.mark.parametrize(
    ("names", "more", "error", "text"),
    [
        ("ab", {}, TypeError, "list of strings"),
        ([1, 2], {}, TypeError, "list of strings"),
        (["a", "a"], {}, ValueError, "unique"),
        ([""], {}, ValueError, "empty"),
        (["a", "b"], {"trans": [TransformExp(), torch.exp]}, TypeError, "Transform"),
        (["a", "b"], {"trans": [TransformExp()] * 3}, ValueError, "1 or 2 transforms"),
        (["a", "b"], {"no_grad_index": [2]}, ValueError, "from 0 to 1"),
        (["a", "b"], {"no_grad_index": [-1]}, ValueError, "from 0 to 1"),
        (["a", "b"], {"start": [1.0]}, ValueError, "2 start values"),
        (["a", "b"], {"start": {"c": 1.0}}, ValueError, "'c'"),
        (["a", "b"], {"start": {"a": float("nan")}}, ValueError, "finite"),
        (["a", "b"], {"trans": [TransformExp()], "start": [1.0, -1.0]}, ValueError, "y > 0"),
    ],
)
def test_constructor_errors(names: Any, more: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Named((2, 1), names, **more)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (torch.zeros(2), ValueError, "3"),
        (torch.zeros(3, 1), ValueError, "flat"),
        (torch.zeros(3, dtype=torch.long), TypeError, "floating-point"),
        ([0.0, 0.0, 0.0], TypeError, "list"),
        ({"sigma^2_0": torch.zeros(1)}, ValueError, r"missing \['sigma\^2_1', 'sigma\^2_2'\]"),
        ({f"sigma^2_{i}": torch.zeros(1) for i in range(4)}, ValueError, r"unexpected \['sigma\^2_3'\]"),
        ({f"sigma^2_{i}": torch.zeros(2) for i in range(3)}, ValueError, "one value"),
    ],
)
def test_parameter_errors(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DiagonalMatrix(3)(given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, ValueError),
        ({"index": 0, "param_name": "a"}, ValueError),
        ({"index": 2}, ValueError),
        ({"index": [0, -1]}, ValueError),
        ({"index": [0, 0.5]}, ValueError),
        ({"param_name": "c"}, KeyError),
        ({"param_name": ["a", "c"]}, KeyError),
    ],
)
def test_refused_set_no_grad_changes_nothing(given: dict[str, Any], error: type[Exception]) -> None:
    mat = Named((2, 1), ["a", "b"], no_grad_index=[1])
    with pytest.raises(error):
        mat.set_no_grad(**given)
    assert mat.no_grad_index == [1]


def test_one_parameter_for_each_theta() -> None:
    mat = AR1Matrix(3)
    assert [name for name, _ in mat.named_parameters()] == ["raw.sigma^2", "raw.rho"]
    assert all(isinstance(p, nn.Parameter) and p.shape == (1,) for p in mat.parameters())


def test_own_thetas_are_float64_zeros() -> None:
    theta = Named((2, 1), ["a", "b"]).theta
    assert theta.dtype == torch.float64
    assert theta.tolist() == [0.0, 0.0]
    assert theta.requires_grad


def test_start_is_on_the_natural_scale() -> None:
    assert ScalarMatrix(2, start=2.0)().diagonal().tolist() == pytest.approx([2.0, 2.0])


def test_start_forms() -> None:
    for start in ([2.0, 0.5], torch.tensor([2.0, 0.5]), {"sigma^2": 2.0, "rho": 0.5}):
        V = AR1Matrix(2, start=start)()
        assert V[0, 0].item() == pytest.approx(2.0)
        assert V[0, 1].item() == pytest.approx(1.0)
    assert AR1Matrix(2, start={"rho": 0.5})()[0, 0].item() == 1.0


def test_fixed_value_stays_on_the_natural_scale() -> None:
    mat = ScalarMatrix(1, start=2.0)
    mat.set_no_grad(0)
    assert mat().item() == pytest.approx(2.0)
    assert not mat().requires_grad


def test_numbers_in_a_dictionary_are_float64() -> None:
    assert AR1Matrix(2)({"sigma^2": 0.1, "rho": 0}).dtype == torch.float64


def test_set_theta() -> None:
    mat = AR1Matrix(2)
    before = mat.theta_parameters()
    mat.set_theta({"rho": torch.tensor(0.3), "sigma^2": torch.tensor(0.1)})
    assert mat.theta.tolist() == pytest.approx([0.1, 0.3])
    assert all(p is q for p, q in zip(before, mat.theta_parameters(), strict=True))
    with pytest.raises(ValueError, match="2 parameters"):
        mat.set_theta(torch.zeros(3))


def test_flags_of_parameters_are_the_index() -> None:
    mat = DiagonalMatrix(3)
    mat.theta_parameters()[1].requires_grad = False
    assert mat.no_grad_index == [1]
    mat.set_no_grad(index=[0, 2])
    assert [p.requires_grad for p in mat.parameters()] == [False, True, False]
    mat.requires_grad_(True)
    assert mat.no_grad_index == []
    mat.set_no_grad(param_name=["sigma^2_2"])
    assert mat.no_grad_index == [2]
    mat.set_no_grad([])
    assert mat.no_grad_index == []


def test_fixing_drops_an_old_gradient() -> None:
    mat = DiagonalMatrix(2)
    mat().sum().backward()
    mat.set_no_grad(0)
    assert [p.grad is None for p in mat.theta_parameters()] == [True, False]


def test_trans_grad_without_transforms_is_ones() -> None:
    assert UnconstrainedMatrix(2).trans_grad(torch.randn(4)).tolist() == [1.0] * 4
    assert Named((2, 1), ["a", "b"], []).trans_grad(torch.randn(2)).tolist() == [1.0, 1.0]


def test_a_transform_shared_by_several_parameters() -> None:
    """Scale and shift apply to each of them, also between others."""
    shared = TransformScaleShift(2.0, 1.0)
    mat = DiagonalMatrix(3, [shared, TransformExpPow2(), shared])
    assert mat.trans_params(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert mat.trans_grad(torch.zeros(3)).tolist() == [2.0, 2.0, 2.0]
    assert DiagonalMatrix(3, [shared])(PARAMS).diagonal().tolist() == [1.0, 2.0, 3.0]


def test_transforms_need_no_hash() -> None:
    class Plain(TransformExp):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return self is other

    mat = DiagonalMatrix(2, [Plain(), Plain()])
    assert mat.trans_params(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_names_may_hold_any_character() -> None:
    names = ["a.b", "training", "training_", "forward", "x/y", "%2E", "", "é"]
    names.remove("")
    mat = Named((len(names), 1), names)
    assert mat.param_names == names
    assert len(mat.state_dict()) == len(names)
    twin = pickle.loads(pickle.dumps(mat))
    twin.load_state_dict(mat.state_dict())
