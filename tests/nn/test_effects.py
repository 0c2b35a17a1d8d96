"""The random effects of a factor: vocabulary, covariance, and what a batch may say of it."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import (
    DiagonalMatrix,
    ExponentialMatrix,
    KnownMatrix,
    KroneckerProduct,
    Levels,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.nn import Effects


def test_vocabulary():
    effects = Effects(["b", "a", "c"])
    for labels in (["a", "x", "b"], np.array(["a", "x", "b"]), pd.Series(["a", "x", "b"], dtype="category")):
        assert effects.encode(labels).tolist() == [1, -1, 0]
    assert effects.encode([]).tolist() == []
    assert effects.encode(["a"]).dtype == torch.int64
    with pytest.raises(ValueError, match="1 missing"):
        effects.encode(["a", None])


def test_numbers_are_compared_as_numbers():
    effects = Effects([10, 2, 7])
    assert effects.level_names == ["10", "2", "7"]
    for labels in ([2, 3, 10], torch.tensor([2, 3, 10]), np.array([2.0, 3.0, 10.0]), ["2", "3", "10"]):
        assert effects.encode(labels).tolist() == [1, -1, 0]
    assert Effects(3).encode([0, 2, 3, -1, 1.0]).tolist() == [0, 2, -1, -1, 1]
    assert Effects(3).encode([]).tolist() == []
    for name in ("a", "01", "²", True, 0.5):
        with pytest.raises(ValueError, match=rf"no whole numbers, '{name}', and these 3 levels are.*`Effects\(sor"):
            Effects(3).encode(["1", name])
    assert Effects(np.int64(3)).level_names == ["0", "1", "2"]


def test_covariances():
    assert isinstance(Effects(4).G, ScalarMatrix)
    slopes = Effects(4, ["intercept", "time"])
    assert slopes.G.shape == (8, 8)
    assert slopes.natural_names == ["sigma^2_intercept", "sigma_intercept_time", "sigma^2_time"]
    assert Effects(4, ["i", "t"], DiagonalMatrix(2)).G.shape == (8, 8)
    K = torch.eye(4, dtype=torch.float64)
    both = KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(K))
    assert Effects(4, ["i", "t"], both).G is both
    plots = Levels(["p", "q", "r"], np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    spatial = Effects(plots, covariance=ExponentialMatrix(plots))
    assert spatial.encode(["r"]).tolist() == [2]
    assert [Effects(4, ["i", "t"]).independent, Effects(4, covariance=KnownMatrix(K)).independent] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [((0,), ValueError, "at least one level"), ((["a", "a"],), ValueError, "unique labels"),
     ((3, ["x", "x"]), ValueError, "unique names"), ((3, "intercept"), ValueError, "list of unique names"),
     ((3, []), ValueError, "list of unique names"),
     ((3, ["intercept"], ScalarMatrix(4)), ValueError, r"\(3, 3\), got \(4, 4\)"),
     ((3, ["i", "t"], ScalarMatrix(3)), ValueError, r"\(2, 2\) or \(6, 6\), got \(3, 3\)"),
     ((3, ["intercept"], torch.eye(3)), TypeError, "`Matrix`")],
)  # fmt: skip
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Effects(*arguments)


def test_entries():
    codes, design = torch.tensor([0, 2, 1], dtype=torch.int32), torch.ones(3, 2)
    taken, none = Effects(3).entry(codes, 3, "a")
    assert taken.dtype == torch.int64
    assert none is None
    assert Effects(3, ["i", "t"]).entry((codes, design), 3, "a")[1].dtype == torch.float64
    assert Effects(3).entry(torch.tensor([-1, 0]), 2, "a", unknown=True)[0].tolist() == [-1, 0]
    Effects(3).entry(torch.zeros(0, dtype=torch.int64), 0, "a")


@pytest.mark.parametrize(
    ("effects", "given", "message"),
    [(["intercept"], torch.tensor([0.0, 1.0]), r"'a' needs integer codes of shape \(2,\).*float32"),
     (["intercept"], torch.tensor([0]), "got 1 codes for 2 rows"),
     (["i", "t"], (torch.tensor([0, 1]), torch.tensor([[1.0, float("nan")]] * 2)), "design of 'a' holds missing"),
     (["intercept"], torch.tensor([0, 3]), "codes from 0 to 2, got 3"),
     (["intercept"], torch.tensor([0, -1]), "got -1.*unknown level"),
     (["i", "t"], torch.tensor([0, 1]), r"needs \(codes, design\)"),
     (["i", "t"], (torch.tensor([0, 1]), torch.ones(2, 3)), r"design of shape \(2, 2\)"),
     (["i", "t"], (torch.tensor([0, 1]), torch.ones(2, 2, requires_grad=True)), "Detach it")],
)  # fmt: skip
def test_refused_entries(effects, given, message):
    with pytest.raises(ValueError, match=message):
        Effects(3, effects).entry(given, 2, "a")


@pytest.mark.parametrize(
    ("given", "what"), [([0, 1], r"\(int, int\)"), (("u", "v", "u"), "3 parts"), (np.zeros(2, dtype=int), "ndarray")]
)
def test_entries_are_tensors(given, what):
    with pytest.raises(TypeError, match=rf"or \(codes, design\), got {what}. Of labels .*`Effects.encode`"):
        Effects(3).entry(given, 2, "a")


@pytest.mark.parametrize("covariance", [None, UnstructuredMatrix(2), "kernel"])
def test_average_level(covariance):
    K = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    given = KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(K)) if covariance == "kernel" else covariance
    effects = Effects(3, ["i", "t"], given)
    expected = torch.einsum("albl->abl", effects.G().reshape(2, 3, 2, 3)).mean(2)
    torch.testing.assert_close(effects.average_level(), expected)


@pytest.mark.parametrize("covariance", [None, UnstructuredMatrix(2), "kernel", DiagonalMatrix(6)])
def test_variances_of_rows(covariance):
    K = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    given = KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(K)) if covariance == "kernel" else covariance
    effects, codes, design = Effects(3, ["i", "t"], given), torch.tensor([2, 0, -1, 1]), torch.randn(4, 2).double()
    found = effects.row_variance(codes, design)
    Z = effects.incidence(codes, design)()
    expected = (Z @ effects.G() @ Z.mT).diagonal().clone()
    expected[2] = design[2] @ effects.average_level() @ design[2]
    torch.testing.assert_close(found, expected)
    one = Effects(3, covariance=KnownMatrix(K))
    torch.testing.assert_close(one.row_variance(codes, None), torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64))


def test_design_of_rows():
    slopes = Effects(2, ["i", "t"])
    Z = slopes.incidence(torch.tensor([1, -1]), torch.tensor([[1.0, 3.0], [1.0, 4.0]], dtype=torch.float64))
    assert Z().tolist() == [[0, 1, 0, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [(Effects(["a", "b"]), Effects(["a", "c", "d"]), r"1 only in the state \(b\) and 2 only here \(c, d\)"),
     (Effects(["a", "b"]), Effects(["b", "a"]), "order differs, first at level 0, 'a' there and 'b' here"),
     (Effects(2), Effects(3), "2 levels without labels, here are 3 levels without labels"),
     (Effects(2), Effects(["a", "b"]), "without labels, here are 2 levels with labels"),
     (Effects(2, ["i", "t"]), Effects(2, ["i", "u"]), r"effects \['i', 't'\], these are \['i', 'u'\]")],
)  # fmt: skip
def test_states_of_other_levels_are_refused(saved, here, message):
    with pytest.raises(ValueError, match=message):
        here.load_state_dict(saved.state_dict())


def test_a_state_of_another_kernel_is_refused():
    one, other = (Effects(2, covariance=KnownMatrix([[1.0, r], [r, 1.0]])) for r in (0.5, 0.4))
    one.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="another covariance: of what G has fixed, K differs"):
        other.load_state_dict(one.state_dict())
    older = one.state_dict()
    del older["_extra_state"]["fixed"]
    other.load_state_dict(older)
