"""The likelihood of a batch: every path against a dense V, value and gradient; its table."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn.covariance import KnownMatrix, KroneckerProduct, UnstructuredMatrix
from openreml_nn.nn import Effects, MixedModelHead
from openreml_nn.nn import batch as module
from openreml_nn.nn.batch import LevelsOf, batch_deviance
from openreml_nn.testing import check_matrix


def agree(value, expected, inputs):
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-10)
    own = torch.autograd.grad(value, inputs)
    for gradient, wanted in zip(own, torch.autograd.grad(expected, inputs, retain_graph=True), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


def test_equals_dense_algebra(case):
    head = case.head()
    agree(head(case.f, case.y, case.groups), case.loss(head), [case.f, *head.parameters()])


def test_features_equal_dense_algebra(case):
    head = case.head(mode="features")
    phi = torch.randn(len(case.y), 3, dtype=torch.float64, requires_grad=True)
    inputs = [phi, *head.parameters()]
    agree(head(phi, case.y, case.groups), case.restricted_loss(head, phi), inputs)


@pytest.mark.parametrize("p", [0, 2])
@pytest.mark.parametrize("restricted", [True, False])
def test_paths_agree(case, p, restricted):
    head = case.head()
    X = torch.randn(len(case.y), p, dtype=torch.float64, requires_grad=True)
    terms = head.factors.terms(case.groups, len(case.y))
    inputs = [case.f, *head.parameters(), *([X] if p else [])]
    expected, rank = batch_deviance(terms, head.residual, case.f, X, restricted, "dense")
    assert rank == p
    for path in ("auto", "levels", "equations"):
        if path == "levels" and not (len(terms) == 1 and terms[0].effects.independent):
            with pytest.raises(ValueError, match="needs one factor with levels independent of one another"):
                batch_deviance(terms, head.residual, case.f, X, restricted, path)
            continue
        value, rank = batch_deviance(terms, head.residual, case.f, X, restricted, path)
        assert rank == p
        agree(value, expected, inputs)
    with pytest.raises(ValueError, match="'auto', 'levels', 'equations', 'dense', got 'levls'"):
        batch_deviance(terms, head.residual, case.f, X, restricted, "levls")


def test_gradients_are_those_of_differences(make):
    for name in ("intercepts", "own variances", "slopes", "slopes with own scale"):
        case = make(name).first(14)
        head = case.head()
        for p in (0, 1):
            X = torch.randn(len(case.y), p, dtype=torch.float64, requires_grad=True)
            terms = head.factors.terms(case.groups, len(case.y))

            def loss(f, X, *_, head=head, terms=terms):
                return batch_deviance(terms, head.residual, f, X)[0]

            assert gradcheck(loss, (case.f, X, *head.parameters()))


def test_second_derivatives_are_refused(make):
    for name in ("intercepts", "slopes"):
        case = make(name)
        loss = case.head()(case.f, case.y, case.groups)
        with pytest.raises(NotImplementedError, match=r"first derivatives only.* mode='exact', solver='dense'"):
            torch.autograd.grad(loss, case.f, create_graph=True)
        head = case.head(mode="exact", solver="dense")  # what the message says
        assert gradgradcheck(lambda f, *_, head=head, case=case: head(f, case.y, case.groups),
                             (case.f, *head.parameters()))  # fmt: skip


def test_sizes_decide_between_dense_and_equations(monkeypatch):
    taken = []
    dense = module.dense_V
    monkeypatch.setattr(module, "dense_V", lambda *given: taken.append("dense") or dense(*given))
    rows = module.FEW_ROWS
    for levels, count, expected in ((5, rows, False), (5, rows - 1, True), (rows, rows, True)):
        head = MixedModelHead({"a": Effects(rows), "b": Effects(levels)})
        codes = torch.arange(count)
        taken.clear()
        head(torch.zeros(count), torch.ones(count), {"a": codes, "b": codes % levels})
        assert bool(taken) is expected


def test_part_of_a_covariance_is_a_lawful_matrix():
    K = torch.eye(4, dtype=torch.float64) + 0.3
    for G, count in (
        (KnownMatrix(K), 4),
        (KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(K)), 4),
        (Effects(4, ["intercept", "t"]).G, 4),
    ):
        check_matrix(LevelsOf(G, torch.tensor([2, 0]), count))
