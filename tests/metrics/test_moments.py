"""Moments against exact rational arithmetic, merged in any order."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from openreml_nn.metrics.moments import merge_moments, moments, no_moments, split_moments

N, K = 60, 3


def exact(rows: Tensor) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Mean and deviations of the numbers as float64 holds them."""
    columns = [[Fraction(value) for value in column] for column in rows.mT.tolist()]
    mean = [sum(column, Fraction(0)) / len(column) for column in columns]
    left = [[value - m for value in column] for column, m in zip(columns, mean, strict=True)]
    return mean, [[sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) for y in left] for x in left]


@pytest.mark.parametrize("bounds", [[], [0], [1], [30], [1, 2, 3, 40, 40]])
@pytest.mark.parametrize("shift", [0.0, 1e4, 1e8, 1e12])
def test_against_exact_arithmetic(bounds: list[int], shift: float) -> None:
    rows = torch.randn(N, K, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2]) + shift
    parts = torch.stack([moments(part) for part in torch.tensor_split(rows, bounds)])
    n, mean, deviations = split_moments(merge_moments(parts))
    true_mean, true_deviations = exact(rows)
    assert n == N
    torch.testing.assert_close(mean, mean.new_tensor([float(m) for m in true_mean]), rtol=4e-16, atol=1e-15)
    expected = mean.new_tensor([[float(value) for value in row] for row in true_deviations])
    scale = expected.diagonal().sqrt()
    assert ((deviations - expected).abs() / (scale[:, None] * scale)).max() < 1e-14 + 2e-16 * shift


def test_one_after_the_other_and_nothing() -> None:
    rows = torch.randn(N, 1, dtype=torch.float64) + 1e8
    running = no_moments(1)
    for row in rows:
        running = merge_moments(torch.stack([running, moments(row[None])]))
    torch.testing.assert_close(running, moments(rows), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(merge_moments(torch.stack([no_moments(1), running])), running, rtol=0.0, atol=0.0)
    torch.testing.assert_close(merge_moments(torch.stack([no_moments(K)] * 2)), no_moments(K))
    torch.testing.assert_close(moments(rows[:0]), no_moments(1))
