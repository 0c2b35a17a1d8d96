"""Random slopes: covariates of each row at its level."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from openreml_nn.covariance import DummyMatrix, KhatriRaoMatrix


def test_slopes() -> None:
    x = np.array([[1.0, 5.0], [1.0, 6.0], [1.0, 7.0]])
    mat = KhatriRaoMatrix(x, DummyMatrix(["b", "a", "b"]), effects=["(Intercept)", "time"])
    assert mat().tolist() == [[0.0, 1.0, 0.0, 5.0], [1.0, 0.0, 6.0, 0.0], [0.0, 1.0, 0.0, 7.0]]
    assert mat.effects == ["(Intercept)", "time"]
    assert mat.levels == ["a", "b"]


@pytest.mark.parametrize("values", [pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]}), [[1.0, 3.0], [2.0, 4.0]]])
def test_forms_of_covariates(values: Any) -> None:
    mat = KhatriRaoMatrix(values, DummyMatrix(["u", "u"]))
    assert mat().tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert mat.effects == ["x0", "x1"]


def test_refused_slopes() -> None:
    dummy = DummyMatrix(["u", "v"])
    with pytest.raises(ValueError, match=r"shape \(2, s\), got \(3, 1\)"):
        KhatriRaoMatrix(np.ones((3, 1)), dummy)
    with pytest.raises(ValueError, match="1 names"):
        KhatriRaoMatrix(np.ones((2, 1)), dummy, effects=["a", "b"])
