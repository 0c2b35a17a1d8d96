"""Values with Jacobians that are given: gradients, their dtypes, and no second derivative."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.closed_form import ClosedForm, refuse_second_derivative

A, B = (torch.randn(2, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for k in (3, 4))


def values(x: Tensor, y: Tensor) -> Tensor:
    """[|x|², a'x + b'y] with y of shape (2, 2)."""
    f = torch.stack([x.detach().square().sum(), A[1] @ x.detach() + B[1] @ y.detach().flatten()])
    of_x = torch.stack([2.0 * x.detach(), A[1]])
    of_y = torch.stack([torch.zeros(2, 2, dtype=torch.float64), B[1].view(2, 2)])
    return ClosedForm.apply(f, "quick", of_x, of_y, x, y)


def test_gradcheck() -> None:
    x, y = A[0].clone().requires_grad_(), B[0].view(2, 2).clone().requires_grad_()
    assert torch.autograd.gradcheck(values, (x, y))


def test_values_are_a_copy_and_inputs_need_no_gradient() -> None:
    f = torch.ones(1, dtype=torch.float64)
    found = ClosedForm.apply(f, "quick", A[:1], A[1])
    assert not found.requires_grad
    found += 1.0
    assert float(f) == 1.0
    x = A[1].clone().requires_grad_()
    values(x, B[0].view(2, 2)).sum().backward()
    torch.testing.assert_close(x.grad, 2.0 * x.detach() + A[1])


def test_gradient_has_the_dtype_of_its_input() -> None:
    x = torch.zeros(3, requires_grad=True)
    ClosedForm.apply(torch.zeros(2, dtype=torch.float64), "quick", A, x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, A.sum(0).to(torch.float32))


def test_an_input_without_elements() -> None:
    x = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    ClosedForm.apply(torch.ones(2, dtype=torch.float64), "quick", torch.zeros(2, 0).double(), x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0,)


def test_second_derivative_is_refused() -> None:
    x = A[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"The quick solver gives first derivatives only.*solver='dense'"):
        torch.autograd.grad(values(x, B[0].view(2, 2)).sum(), x, create_graph=True)
    with torch.no_grad():
        refuse_second_derivative("quick")
