"""All rows through the engine: the same likelihood and gradients as the dense one, whatever the solver."""

from operator import attrgetter

import pytest
import torch
from torch.autograd import gradcheck

from openreml_nn.nn import Effects, MixedModelHead
from openreml_nn.solvers import SOLVERS


def solvers(case):
    """Names of the solvers that take the V of a case."""
    V = case.head().covariance(case.groups)
    return ["auto", *(name for name, kind in SOLVERS.items() if kind().refusal(V) is None)]


def agree(value, expected, inputs):
    assert value.item() == pytest.approx(expected.item(), abs=1e-10)
    wanted = torch.autograd.grad(expected, inputs)
    for own, other in zip(torch.autograd.grad(value, inputs), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_every_solver(case):
    for solver in solvers(case):
        head = case.head(mode="exact", solver=solver)
        rows = head.rows(case.groups)
        head(case.f.detach() + 1.0, torch.randn(len(case.y)), rows)  # other data, from which the next goes on
        for groups in (rows, case.groups):
            agree(head(case.f, case.y, groups), case.loss(head), [case.f, *head.parameters()])


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_every_solver_with_features(case, method):
    phi = torch.randn(len(case.y), 2, dtype=torch.float64, requires_grad=True)
    for solver in solvers(case):
        head = case.head(mode="features", solver=solver, method=method)
        whole, batch = head(phi, case.y, head.rows(case.groups)), head(phi, case.y, case.groups)
        agree(whole, batch, [phi, *head.parameters()])


@pytest.mark.parametrize("mode", ["exact", "features"])
def test_gradients_are_those_of_differences(make, mode):
    for name in ("intercepts", "slopes", "kernel", "crossed"):
        case = make(name).first(14)
        head = case.head(mode=mode)
        rows, output = head.rows(case.groups), case.f
        if mode == "features":
            output = torch.randn(len(case.y), 1, dtype=torch.float64, requires_grad=True)

        def loss(output, y, *_, head=head, rows=rows):
            return head(output, y, rows)

        assert gradcheck(loss, (output, (2.0 * case.y).requires_grad_(), *head.parameters()), atol=1e-6)


def test_what_depends_on_the_levels_alone_is_kept(make):
    for name, solver, kept in (
        ("kernel", "spectral", "reduction"),
        ("intercepts", "blocks", "pattern"),
        ("crossed", "mixed_model_equations", "products.coupling"),
    ):
        case, of = make(name), attrgetter(kept)
        problem = SOLVERS[solver]().prepare(case.head().covariance(case.groups), case.y)
        other = problem.with_data(torch.randn(len(case.y)), torch.randn(len(case.y), 2))
        assert of(other) is of(problem)
        assert other.p == 2
        with pytest.raises(ValueError, match="has 48 observations, and the other data are 47"):
            problem.with_data(case.y[1:])


def test_the_history_of_a_step_is_not_kept(make):
    case = make("crossed")
    head = case.head(mode="exact")
    rows = head.rows(case.groups)
    head(case.f, case.y, rows)
    assert not rows._first.fixed.e.requires_grad


def test_other_rows_are_refused():
    head = MixedModelHead({"a": Effects(3)}, mode="exact")
    rows = head.rows(torch.tensor([0, 1, 2, 0]))
    assert len(rows) == 4
    with pytest.raises(ValueError, match="needs all 4 of them, got 3"):
        head(torch.zeros(3), torch.ones(3), rows)
