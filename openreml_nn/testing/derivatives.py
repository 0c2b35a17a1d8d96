"""Laws of derivatives: closed form, autograd, forward mode and differences agree, and no call leaves a trace."""

import copy

import torch
from torch import Tensor

from openreml_nn.testing.case import Case, LawBroken, require, require_close

STEP = 1e-5


def _differences(function, theta: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Central differences of ``function``, one row for each parameter."""
    rows = []
    for i in range(len(theta)):
        step = torch.zeros_like(theta)
        step[i] = STEP
        rows.append((function(theta + step) - function(theta - step)).detach() / (2.0 * STEP))
    return torch.stack(rows)


def jacobian(case: Case, theta: Tensor) -> None:
    """``grad`` is ∂V/∂θ for the free parameters, compared with ``auto_grad`` and with differences."""
    V = case.matrix
    free = V.free_index
    (J, names), (automatic, same_names) = V.grad(theta), V.auto_grad(theta)
    require(names == [V.param_names[i] for i in free] == same_names, f"`grad` names its parameters {names}")
    if not free:
        require(J is None and automatic is None, "`grad` without free parameters is not (None, [])")
        return
    if J is None or automatic is None:
        raise LawBroken("`grad` is None, but there are free parameters")
    require_close(J, automatic, "`grad` against `auto_grad`")
    require_close(J, _differences(V.build, theta)[free], "`grad` against differences", tolerance=1e-6)


def function_transforms(case: Case, theta: Tensor) -> None:
    """``jacrev``, ``jacfwd`` and ``vmap`` of ``torch.func`` take ``build`` and agree."""
    build = case.matrix.build
    if len(theta):
        forward = torch.func.jacfwd(build)(theta)
        require_close(torch.func.jacrev(build)(theta), forward, "`jacrev` against `jacfwd`")
        batch = torch.stack([case.thetas[0], theta])
        require_close(torch.func.vmap(build)(batch), torch.stack([build(x) for x in batch]), "`vmap` of `build`")


def second_derivative(case: Case, theta: Tensor) -> None:
    """Of a nonlinear function of the matrix, in three orders of forward and reverse mode."""
    if not len(theta):
        return
    weights = case.random(*case.matrix.shape)

    def function(x: Tensor) -> Tensor:
        return (weights * case.matrix.build(x).square()).sum()

    gradient, forward = torch.func.grad(function), torch.func.jacfwd(function)
    expected = _differences(gradient, theta)
    require_close(torch.func.jacrev(gradient)(theta), expected, "reverse over reverse", tolerance=1e-5)
    require_close(torch.func.jacfwd(gradient)(theta), expected, "forward over reverse", tolerance=1e-5)
    require_close(torch.func.jacrev(forward)(theta), expected, "reverse over forward", tolerance=1e-5)


def transforms(case: Case, theta: Tensor) -> None:
    """``trans_grad`` is the diagonal of the Jacobian of ``trans_params``."""
    V = case.matrix
    natural = V.trans_params(theta)
    require(natural.shape == theta.shape, f"`trans_params` has shape {tuple(natural.shape)}")
    if len(theta):
        slopes = torch.func.jacrev(V.trans_params)(theta)
        require_close(torch.diag_embed(V.trans_grad(theta)), slopes, "`trans_grad`")


def own_gradient(case: Case, theta: Tensor) -> None:
    """Calls before it do not matter (also without gradient), each graph is new, and gradients reach the free thetas."""
    weights = case.random(*case.matrix.shape)
    fresh, used = copy.deepcopy(case.matrix), copy.deepcopy(case.matrix)
    with torch.no_grad():
        used(), used(used.theta)
    with torch.inference_mode():
        used(), used.add_to(torch.zeros_like(weights), used.theta)
    expected = _gradients(fresh, fresh() if fresh.num_params else None, weights)
    for call in ("first", "second"):
        V = used.add_to(torch.zeros_like(weights), used.theta) if call == "second" else used()
        got = _gradients(used, V if used.num_params else None, weights)
        for name, mine, right in zip(used.param_names, got, expected, strict=True):
            require((mine is None) == (right is None), f"the {call} backward after `no_grad` misses {name!r}")
            if mine is not None and right is not None:
                require_close(mine, right, f"the {call} backward after `no_grad` for {name!r}")


def _gradients(matrix, V: Tensor | None, weights: Tensor) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    for p in matrix.theta_parameters():
        p.grad = None
    if V is not None and V.requires_grad:
        (V * weights.to(V.dtype)).sum().backward()
    return [p.grad for p in matrix.theta_parameters()]
