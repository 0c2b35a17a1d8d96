"""Factors of a head by name: what a batch says of them becomes terms, or an error."""

import pytest
import torch

from openreml_nn.covariance import DiagonalMatrix, ScalarMatrix
from openreml_nn.nn import Effects
from openreml_nn.nn.factors import Factors


def test_terms_are_in_the_order_of_the_factors():
    factors = Factors({"site": Effects(3), "a.b": Effects(2, ["intercept", "t"])})
    assert list(factors.effects) == ["site", "a.b"]
    codes, design = torch.tensor([2, 0, -1]), torch.ones(3, 2)
    site, other = factors.terms({"a.b": (codes.clamp(max=1), design), "site": codes}, unknown=True)
    assert (site.effects, other.effects) == tuple(factors.effects.values())
    assert torch.equal(site.codes, codes)
    assert site.design is None
    assert other.design is not None
    assert (site.one_effect, other.one_effect) == (True, False)
    with pytest.raises(ValueError, match="'site' has codes from 0 to 2, got -1"):
        factors.terms({"a.b": (codes.clamp(max=1), design), "site": codes})
    with pytest.raises(ValueError, match="one code for each row, got 3 codes for 4 rows"):
        factors.terms({"a.b": (codes, design), "site": codes}, 4)


def test_one_factor_needs_no_dictionary():
    (term,) = Factors({"site": Effects(3)}).terms(torch.tensor([0, 2]))
    assert term.codes.tolist() == [0, 2]


def test_average_levels():
    (block,) = Factors({"site": Effects(2, covariance=DiagonalMatrix(2, start=[1.0, 3.0]))}).average_levels()
    assert block.tolist() == [[pytest.approx(2.0)]]
    assert not block.requires_grad


def test_tied_thetas_are_there_once():
    G, residual = ScalarMatrix(2, start=4.0), ScalarMatrix(1, start=9.0)
    factors = Factors({"a": Effects(2, covariance=G), "b": Effects(2, covariance=G)})
    assert torch.cat(factors.thetas_with(residual)).exp().tolist() == pytest.approx([2.0, 3.0])
