"""A head under ``torch.func``, against its own loss and backward pass."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap


class Model(nn.Module):
    """A linear network and the head of a case."""

    def __init__(self, case, **options):
        super().__init__()
        self.case, self.x = case, torch.randn(len(case.y), 3, dtype=torch.float64)
        self.network = nn.Linear(3, 2 if options.get("mode") == "features" else 1, dtype=torch.float64)
        self.head = case.head(**options)

    def forward(self, y):
        return self.head(self.network(self.x), y, self.case.groups)

    def state(self):
        return {name: p.detach() for name, p in self.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"mode": "exact"}, {"mode": "features"}, {"mode": "features", "method": "ML"}])
@pytest.mark.parametrize("name", ["intercepts", "slopes", "crossed", "own variances", "slopes, crossed, kernel"])
def test_gradients_and_ensembles(make, name, options):
    case = make(name)
    model = Model(case, **options)
    loss = model(case.y)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}

    def value(state, y=case.y):
        return functional_call(model, state, (y,))

    state = model.state()
    for found in (grad(value)(state), {k: v[1] for k, v in vmap(grad(value))(pairs(state)).items()}):
        for key, own in expected.items():
            torch.testing.assert_close(found[key], own)
    several = vmap(value, in_dims=(None, 0))(state, torch.stack([case.y + 1.0, case.y]))
    torch.testing.assert_close(several[1], loss.detach())
    ones = {key: torch.ones_like(p) for key, p in state.items()}
    slope = sum(own.sum() for own in expected.values())
    torch.testing.assert_close(jvp(value, (state,), (ones,)), (loss.detach(), slope))


def pairs(state):
    """Other parameters, and these."""
    return {key: torch.stack([p + 0.1, p]) for key, p in state.items()}


def test_second_derivatives(make):
    case = make("slopes")
    model = Model(case)
    state = model.state()

    def value(weight):
        return functional_call(model, state | {"network.weight": weight}, (case.y,))

    V = model.head.covariance(case.groups)().detach()
    expected = model.x.mT @ torch.linalg.solve(V, model.x) / len(case.y)
    torch.testing.assert_close(hessian(value)(state["network.weight"])[0, :, 0], expected)


def test_levels_that_are_mapped_over_are_refused(make):
    case = make("intercepts")
    head, codes = case.head(), case.groups["a"]
    with pytest.raises(ValueError, match="the levels of rows as plain tensors, the same for all"):
        vmap(lambda own: head(case.f.detach(), case.y, {"a": own}))(torch.stack([codes, codes]))
    rows = head.rows(case.groups)
    with pytest.raises(ValueError, match="the levels of rows as plain tensors"):
        grad(lambda f: head(f, case.y, rows))(case.f.detach())
