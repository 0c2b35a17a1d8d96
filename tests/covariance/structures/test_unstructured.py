"""Unstructured: positive definite at every theta, its report, its accessors, its start."""

from typing import Any

import pytest
import torch

from openreml_nn.covariance import Levels, UnstructuredMatrix

START = torch.tensor([[4.0, 1.0, 0.5], [1.0, 9.0, -2.0], [0.5, -2.0, 1.0]], dtype=torch.float64)


def test_start_is_the_matrix() -> None:
    mat = UnstructuredMatrix(3, start=START)
    torch.testing.assert_close(mat(), START)
    torch.testing.assert_close(UnstructuredMatrix(3, start=START.tolist())(), START)


def test_accessors() -> None:
    mat = UnstructuredMatrix(3, start=START)
    theta = mat.theta.detach()
    torch.testing.assert_close(mat.standard_deviations(), torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    sd = mat.standard_deviations(theta)
    torch.testing.assert_close(mat.correlation(theta), START / sd[:, None] / sd)
    torch.testing.assert_close(mat.factor(theta), torch.linalg.cholesky(START))
    assert mat.correlation().diagonal().tolist() == pytest.approx([1.0] * 3)


def test_report_shows_variances_and_covariances() -> None:
    mat = UnstructuredMatrix(Levels(["int", "time"]), start=[[4.0, 1.0], [1.0, 9.0]])
    assert mat.param_names == ["L_int_int", "L_time_int", "L_time_time"]
    assert mat.natural_names == ["sigma^2_int", "sigma_int_time", "sigma^2_time"]
    assert mat.natural(mat.theta).tolist() == pytest.approx([4.0, 1.0, 9.0])


def test_positive_definite_at_every_theta() -> None:
    mat = UnstructuredMatrix(4)
    for scale in (0.1, 1.0, 3.0):
        V = mat(scale * torch.randn(mat.num_params, dtype=torch.float64))
        assert torch.linalg.eigvalsh(V)[0].item() > 0.0


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (torch.ones(2, 3), r"shape \(2, 2\), got shape \(2, 3\)"),
        ([[1.0, 0.5], [0.4, 1.0]], "not symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
    ],
)
def test_refused_start(start: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        UnstructuredMatrix(2, start=start)
