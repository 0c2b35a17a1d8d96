"""V taken apart into operands, terms Z G Z' and random terms."""

import torch

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.solvers.terms import RESIDUAL, operands_of, propagated_terms, random_terms

N = 6
Z = DummyMatrix([0, 0, 1, 1, 2, 2])
TERMS: dict[str, Matrix] = {
    "serial": CovariancePropagation(Z, AR1Matrix(3)),
    "rows": AR1Matrix(N),
    "plain": CovariancePropagation(Z, ScalarMatrix(3)),
    RESIDUAL: CovariancePropagation(DummyMatrix(torch.arange(N)), ScalarMatrix(N)),
}
V = Sum(TERMS)
THETA = torch.arange(6, dtype=torch.float64)


def test_operands_add_up_to_V() -> None:
    operands = operands_of(V, THETA)
    assert [name for name, _, _ in operands] == list(TERMS)
    assert [own.tolist() for _, _, own in operands] == [[0, 1], [2, 3], [4], [5]]
    torch.testing.assert_close(torch.stack([matrix.build(own) for _, matrix, own in operands]).sum(0), V.build(THETA))


def test_a_structure_alone_is_one_operand_without_a_name() -> None:
    for alone in (TERMS["serial"], TERMS["rows"], KroneckerProduct(ScalarMatrix(1), AR1Matrix(2))):
        theta = THETA[: alone.num_params]
        ((name, matrix, own),) = operands_of(alone, theta)
        assert (name, matrix) == ("", alone)
        assert own is theta


def test_terms_are_those_of_a_design() -> None:
    assert [term.name for term in propagated_terms(V, THETA)] == ["serial", "plain", RESIDUAL]
    assert [term.name for term in random_terms(V, THETA)] == ["serial", "plain"]
    (alone,) = random_terms(TERMS["serial"], THETA[:2])
    assert alone.name == ""
    assert propagated_terms(TERMS["rows"], THETA[:2]) == []


def test_parts_of_a_term() -> None:
    for term in propagated_terms(V, THETA):
        operand = V.operand(term.name)
        Zb = term.Z.build(term.Z_params)
        own = THETA[V.operand_index(term.name)]
        torch.testing.assert_close(Zb @ term.G.build(term.G_params) @ Zb.mT, operand.build(own))


def test_a_shared_structure_has_the_same_parameters_in_both_terms() -> None:
    G = ScalarMatrix(3)
    tied = Sum(a=CovariancePropagation(Z, G), b=CovariancePropagation(DummyMatrix([0, 1, 2, 0, 1, 2]), G))
    first, second = random_terms(tied, torch.tensor([0.7], dtype=torch.float64))
    assert first.G is second.G
    assert first.G_params.tolist() == second.G_params.tolist() == [0.7]
