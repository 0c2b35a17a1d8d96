"""Numbers whose derivatives are known in closed form, as differentiable tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class ClosedForm(Function):
    r"""Values f and their Jacobians J_i with respect to inputs x_i as a function of these inputs: df = Σ J_i dx_i.

    ``ClosedForm.apply(f, who, *jacobians, *inputs)`` takes f of shape (m,), the name of the solver that is asked, one
    Jacobian of shape (m, *x_i.shape) for each input, and the inputs. Once differentiable: the Jacobians are constants
    to it, so that a second derivative would be a silent zero and is refused.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, who: str, *given: Tensor) -> Tensor:
        half = len(given) // 2
        ctx.who = who
        ctx.save_for_backward(*given[:half])
        ctx.dtypes = [x.dtype for x in given[half:]]
        return f.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivative(ctx.who)
        (g,) = grads
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        own = [(g @ J.flatten(1)).reshape(J.shape[1:]).to(dtype) for J, dtype in pairs]
        return None, None, *([None] * len(own)), *own


def refuse_second_derivative(who: str) -> None:
    """Raise a NotImplementedError in the backward pass of a solver of this name that is itself differentiated."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"The {who} solver gives first derivatives only. For second derivatives take solver='dense'."
        )
