"""Parameters as one vector, and an objective where they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openreml_nn.optim.points import Points

H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.fixture
def params() -> list[nn.Parameter]:
    """Three numbers that are moved, in two parameters, and one that is not."""
    values = ([1.0, 2.0], [7.0], [[3.0]])
    params = [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]
    params[1].requires_grad_(False)
    return params


def closure_of(params: list[nn.Parameter], add: float = 0.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = sum((p.square().sum() for p in params), torch.zeros((), dtype=torch.float64)) + add
        loss.backward()
        return loss

    return closure


def test_a_point(params: list[nn.Parameter]) -> None:
    points = Points([{"params": params}], lambda: H, None)
    at = points.at_present(closure_of(params), points.geometry().units)
    assert (points.count, at.loss, at.theta.tolist(), at.score.tolist()) == (3, 63.0, [1, 2, 3], [-2, -4, -6])
    np.testing.assert_array_equal(at.information, H.numpy())
    np.testing.assert_array_equal(at.units, np.ones(3))


def test_no_information_where_the_loss_is_too_large(params: list[nn.Parameter]) -> None:
    def never() -> Any:
        raise AssertionError

    at = Points([{"params": params}], never, None).at_present(closure_of(params), np.ones(3), most=60.0)
    assert (at.loss, at.theta.size) == (63.0, 0)


def test_information_of_another_shape(params: list[nn.Parameter]) -> None:
    with pytest.raises(ValueError, match=r"must give a matrix of shape \(3, 3\), got \(2, 2\)"):
        Points([{"params": params}], lambda: H[:2, :2], None).at_present(closure_of(params), None)


def test_a_trial_without_a_number(params: list[nn.Parameter]) -> None:
    def fails() -> Tensor:
        raise torch.linalg.LinAlgError

    points = Points([{"params": params}], lambda: H, None)
    assert points.trial(fails, np.ones(3), 100.0) is None
    assert points.trial(closure_of(params, float("inf")), np.ones(3), float("inf")) is None
    assert points.trial(closure_of(params), np.ones(3), 100.0) is not None


def test_write(params: list[nn.Parameter]) -> None:
    points = Points([{"params": params}], lambda: H, None)
    with torch.no_grad():
        points.write(np.array([4.0, 5.0, 6.0]), np.array([0.1, 0.2, 0.3]))
    assert [p.tolist() for p in params] == [[4.0, 5.0], [7.0], [[6.0]]]
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [0.1, 0.2]
    assert params[1].grad is None


@pytest.mark.parametrize("through_data", [False, True])
def test_whether_they_were_moved(params: list[nn.Parameter], through_data: bool) -> None:
    points = Points([{"params": params}], lambda: H, None)
    points.remember()
    assert not points.were_moved(np.array([1.0, 2.0, 3.0]))
    with torch.no_grad():
        (params[0].data if through_data else params[0])[0] = 1.5
    assert points.were_moved(np.array([1.0, 2.0, 3.0]))
