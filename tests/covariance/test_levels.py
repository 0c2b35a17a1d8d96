"""`Levels`: a size, labels and values in one object."""

import operator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import AR1Matrix, DiagonalMatrix, ExponentialMatrix, Levels, ScalarMatrix
from openreml_nn.covariance.levels import labels_of, size_of, tensor_of, values_of


def test_stands_for_a_size_labels_and_values() -> None:
    levels = Levels(["a", "b"], [1.5, 2.5])
    assert len(levels) == operator.index(levels) == 2
    assert np.asarray(levels).tolist() == [1.5, 2.5]
    assert labels_of(levels, 2) == ["a", "b"]
    assert repr(Levels(range(6))) == "Levels(6: 0, 1, 2, 3, …)"


def test_one_object_serves_any_structure() -> None:
    levels = Levels([2001, 2003])
    assert ScalarMatrix(levels).shape == (2, 2)
    assert DiagonalMatrix(levels).param_names == ["sigma^2_2001", "sigma^2_2003"]
    assert AR1Matrix(levels).lags.tolist() == [0, 2]
    assert ExponentialMatrix(levels).distances[0, 1].item() == 2.0


def test_slash_in_a_label() -> None:
    assert DiagonalMatrix(Levels(["a/b"])).param_names == ["sigma^2_a_b"]


@pytest.mark.parametrize(
    ("labels", "values", "text"),
    [(["a", "b", "a"], None, "'a' more than once"), ([1, "1"], None, "unique"), (["a", "b"], [1.0], "2 labels and 1")],
)
def test_errors(labels: Any, values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Levels(labels, values)


def test_sizes() -> None:
    assert size_of(np.int64(3), "X") == 3
    with pytest.raises(ValueError, match="`X` needs a size of at least 1, got 0"):
        size_of(0, "X")
    with pytest.raises(TypeError, match="`X` needs its size as an integer, got float"):
        size_of(2.0, "X")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1, 2]), pd.Series([1, 2])])
def test_values_of(given: Any) -> None:
    values = values_of(given, "X")
    assert values.dtype == torch.float64
    assert values.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("given", [[], [1.0, np.nan], [np.inf], np.zeros((1, 1, 1))])
def test_values_that_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="finite values"):
        values_of(given, "X")


def test_values_that_are_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"numeric values, got .*'a'"):
        values_of(["a", "b"], "X")


def test_tensor_of_keeps_precision() -> None:
    assert tensor_of([[0.1]]).dtype == torch.float64
    assert tensor_of(pd.DataFrame({"a": [1.0], "b": [2.0]})).tolist() == [[1.0, 2.0]]
    assert tensor_of(torch.ones(1)).dtype == torch.float32
