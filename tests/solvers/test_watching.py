"""What of torch's transforms is seen from inside a function and from a tensor."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.watching import is_watched, transforming

X = torch.ones(3, dtype=torch.float64)


def test_nothing_is_followed_outside() -> None:
    assert not transforming()
    assert not is_watched()
    assert not is_watched(X, X.clone().requires_grad_())


def test_transforms_are_seen() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((transforming(), is_watched(X, x), is_watched(X)))
        return x.square().sum()

    torch.func.grad(look)(X)
    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.jvp(look, (X,), (X,))
    assert seen == [(True, True, False)] * 3


def test_a_batch_of_gradients_is_seen() -> None:
    seen: list[bool] = []
    x = X.clone().requires_grad_()
    y = 2.0 * x
    y.register_hook(lambda gradient: seen.append(is_watched(gradient)))
    torch.autograd.grad(y, x, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    assert seen == [True]


def test_the_compiler_takes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen: list[bool] = []
    torch.func.grad(lambda x: seen.append(transforming()) or x.sum())(X)  # type: ignore[func-returns-value]
    assert seen == [False]
