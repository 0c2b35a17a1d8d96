"""What all operators share: operands in every form, names, tied structures, fixed parts, reports."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    Inverse,
    KroneckerProduct,
    Matrix,
    Operator,
    Product,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
)


def test_operands_by_position() -> None:
    V = Sum(ScalarMatrix(2), AR1Matrix(2))
    assert V.operand_names == ["op_0", "op_1"]
    assert V.param_names == ["op_0/sigma^2", "op_1/sigma^2", "op_1/rho"]
    assert V.natural_names == ["op_0/sigma^2", "op_1/sigma^2", "rho"]


@pytest.mark.parametrize("by", ["keyword", "dictionary", "both"])
def test_operands_by_name(by: str) -> None:
    A, B = ScalarMatrix(2), AR1Matrix(2)
    V = Sum(gen=A, residual=B) if by == "keyword" else Sum({"gen": A, "residual": B})
    if by == "both":
        V = Sum({"gen": A}, residual=B)
    assert V.param_names == ["gen/sigma^2", "residual/sigma^2", "residual/rho"]
    assert V.operand("residual") is B
    assert V.operand_list() == [A, B]
    assert V.operand_index("residual") == [1, 2]
    assert V.natural_names == V.param_names


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two operands with the name 'op_0'"):
        Sum(ScalarMatrix(2), op_0=ScalarMatrix(2))
    with pytest.raises(ValueError, match="'a'"):
        Sum({"a": ScalarMatrix(2)}, a=ScalarMatrix(2))


def test_a_tensor_is_a_fixed_operand() -> None:
    V = Sum(torch.eye(2), ScalarMatrix(2))
    assert isinstance(V.operand("op_0"), SimpleMatrix)
    assert V.param_names == ["op_1/sigma^2"]
    assert V(torch.zeros(1)).tolist() == [[2.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize(
    ("operands", "named", "error", "text"),
    [
        ((), {}, ValueError, "at least one operand"),
        (({},), {}, ValueError, "at least one operand"),
        ((np.eye(2),), {}, TypeError, "ndarray for 'op_0'"),
        (({"a/b": torch.eye(2)},), {}, ValueError, "'a/b'"),
        (({"": torch.eye(2)},), {}, ValueError, "without '/'"),
        (({1: torch.eye(2)},), {}, ValueError, "got 1"),
        ((torch.eye(2), 3.0), {}, TypeError, "float for 'op_1'"),
    ],
)
def test_refused_operands(operands: Any, named: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Sum(*operands, **named)


def test_names_of_any_kind_survive_state_dict_and_copies() -> None:
    names = ["a.b", "c:d", "e^2", "training", "operands", "raw", "op_1", "forward"]
    V = BlockDiagonal({name: ScalarMatrix(1, start=i + 1.0) for i, name in enumerate(names)})
    assert V.param_names == [f"{name}/sigma^2" for name in names]
    for twin in (copy.deepcopy(V), pickle.loads(pickle.dumps(V))):
        assert twin.operand_names == names
        twin.load_state_dict(V.state_dict())
        torch.testing.assert_close(twin(), torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)))


def test_nested_names_and_leaves() -> None:
    V = Sum(subject=KroneckerProduct(IdentityMatrix(2), AR1Matrix(2)), residual=ScalarMatrix(4))
    assert V.param_names == ["subject/op_1/sigma^2", "subject/op_1/rho", "residual/sigma^2"]
    assert V.natural_names == ["subject/sigma^2", "subject/rho", "residual/sigma^2"]
    assert [(path, index) for path, _, index in V.leaves() if index] == [
        (("subject", "op_1"), [0, 1]),
        (("residual",), [2]),
    ]


def test_natural_is_that_of_the_leaves() -> None:
    V = Sum(a=UnstructuredMatrix(2, start=[[4.0, 1.0], [1.0, 9.0]]), b=ScalarMatrix(2, start=2.0))
    assert V.natural_names == ["a/sigma^2_0", "a/sigma_0_1", "a/sigma^2_1", "b/sigma^2"]
    assert V.natural(V.theta).tolist() == pytest.approx([4.0, 1.0, 9.0, 2.0])


def test_operator_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Operator(ScalarMatrix(1))  # type: ignore[abstract]


# ---- one structure at two places -------------------------------------------------------------------------------------


def test_tied_structures_are_one_set_of_parameters() -> None:
    A = AR1Matrix(2)
    V = BlockDiagonal(north=A, south=A, other=ScalarMatrix(1))
    assert V.param_names == ["north/sigma^2", "north/rho", "other/sigma^2"]
    assert len(list(V.parameters())) == 3
    assert V.operand_index("south") == [0, 1]
    assert len(V.leaves()) == 2


def test_gradients_of_tied_structures_add_up() -> None:
    A = ScalarMatrix(2)
    (grad,) = torch.autograd.grad(BlockDiagonal(A, A)().sum(), A.theta_parameters())
    (once,) = torch.autograd.grad(A().sum(), A.theta_parameters())
    torch.testing.assert_close(grad, 2.0 * once)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_tied(how: str) -> None:
    A = AR1Matrix(2)
    V = Sum(BlockDiagonal(A, A), BlockDiagonal(ScalarMatrix(2), A))
    twin = copy.deepcopy(V) if how == "deepcopy" else pickle.loads(pickle.dumps(V))
    twin.set_theta(torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64))
    (_, first, _), _ = twin.leaves()
    places = [matrix for matrix in twin.modules() if isinstance(matrix, AR1Matrix)]
    assert len(places) == 1
    assert places[0] is first
    torch.testing.assert_close(twin(), V(twin.theta))
    assert V.theta.tolist() == [0.0] * 3


def test_tied_structures_move_together() -> None:
    A = AR1Matrix(2)
    V = BlockDiagonal(A, A).float()
    assert V().dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in A.parameters())
    V.load_state_dict(BlockDiagonal(A, A).state_dict())


# ---- fixed parameters through operators ------------------------------------------------------------------------------


def test_fixing_reaches_the_operand_and_back() -> None:
    A, B = AR1Matrix(2), ScalarMatrix(2)
    V = Sum(a=A, b=B)
    V.set_no_grad(param_name="a/rho")
    assert A.no_grad_index == [1]
    B.set_no_grad(0)
    assert V.no_grad_index == [1, 2]
    J, names = V.grad(torch.zeros(3))
    assert J is not None
    assert names == ["a/sigma^2"]
    assert J.shape == (1, 2, 2)
    V.set_no_grad([])
    assert A.no_grad_index == B.no_grad_index == []


def test_fixed_before_it_is_an_operand() -> None:
    A = AR1Matrix(2, start={"rho": 0.5})
    A.set_no_grad(param_name="rho")
    V = KroneckerProduct(A, IdentityMatrix(2))
    assert V.no_grad_index == [1]
    assert V()[0, 2].item() == pytest.approx(0.5)


def test_casts_reach_the_operands() -> None:
    """Also where a method of the operator might hide one of the module."""
    V = KroneckerProduct(AR1Matrix(2), ScalarMatrix(2)).float()
    assert V().dtype == torch.float32
    assert V.double()().dtype == torch.float64
    assert V.to("cpu") is V


# ---- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "powers"),
    [
        (lambda: Sum(ScalarMatrix(2), AR1Matrix(2)), [1, 1, 0]),
        (lambda: Sum(ScalarMatrix(2), IdentityMatrix(2)), [0]),
        (lambda: KroneckerProduct(UnstructuredMatrix(2), AR1Matrix(2)), [0.5, 0.5, 0.5, 0, 0]),
        (lambda: KroneckerProduct(IdentityMatrix(2), AR1Matrix(2)), [1, 0]),
        (lambda: (lambda A: HadamardProduct(A, A))(ScalarMatrix(2)), [0.5]),
        (lambda: (lambda A, B: Product(A, Sum(A, B)))(ScalarMatrix(2), ScalarMatrix(2)), [0, 0]),
        (lambda: Gram(DiagonalMatrix(2)), [0.5, 0.5]),
        (lambda: Inverse(ScalarMatrix(2)), [-1]),
        (lambda: CovariancePropagation(DummyMatrix([0, 1]), ScalarMatrix(2)), [1]),
    ],
)
def test_scale_powers(make: Any, powers: list[float]) -> None:
    assert make().scale_powers == powers


def test_a_fixed_variance_does_not_carry_the_scale_of_a_product() -> None:
    A, B = ScalarMatrix(2), AR1Matrix(2)
    A.set_no_grad(0)
    assert KroneckerProduct(A, B).scale_powers == [0, 1, 0]


def test_text() -> None:
    V = Sum(a=ScalarMatrix(2), b=IdentityMatrix(2))
    assert repr(V) == "Sum(a=ScalarMatrix(shape=(2, 2), params=['sigma^2']), b=IdentityMatrix(shape=(2, 2), params=[]))"


def test_add_to_a_sum_changes_only_its_target() -> None:
    K = torch.eye(2, dtype=torch.float64)
    V: Matrix = Sum(K, ScalarMatrix(2))
    out = torch.zeros(2, 2, dtype=torch.float64)
    assert V.add_to(out, V.theta.detach()) is out
    assert torch.equal(K, torch.eye(2, dtype=torch.float64))
