"""What a head asks of a batch; that heads ask it is in test_head.py."""

import numpy as np
import pytest
import torch

from openreml_nn.nn.checks import (
    explained,
    finite,
    one_number,
    require_column,
    require_finite,
    require_pair,
)
from openreml_nn.solvers import NotPositiveDefinite

GOOD, BAD = torch.ones(3), torch.tensor([1.0, torch.nan, torch.inf])


def test_shapes():
    require_column("y", GOOD[:, None])
    require_pair(GOOD[:, None], GOOD)
    with pytest.raises(ValueError, match=r"y must be of shape \(m,\) or \(m, 1\), got \(\)"):
        require_column("y", GOOD[0])
    with pytest.raises(TypeError, match="y as a tensor, got list"):
        require_pair(GOOD, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="a single number from the network"):
        require_pair(GOOD.mean(), GOOD)


def test_values():
    require_finite(GOOD, GOOD)
    with pytest.raises(ValueError, match="2 missing or infinite values in y, of 3"):
        require_finite(BAD, BAD)
    with pytest.raises(ValueError, match="2 missing or infinite values in the output of the network, of 3"):
        require_finite(BAD, GOOD)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [(torch.linalg.LinAlgError("pivot 2"), NotPositiveDefinite, r"at s = 0\.5\. A variance"),
     (NotPositiveDefinite("K is not."), NotPositiveDefinite, r"thetas\. The solver says: K is not\."),
     (ValueError("shapes"), ValueError, "^shapes$")],
)  # fmt: skip
def test_errors_are_explained(error, kind, said):
    with pytest.raises(kind, match=said), explained(GOOD, GOOD, lambda: {"s": 0.5}):
        raise error
    with pytest.raises(ValueError, match="in y, of 3"), explained(GOOD, BAD, lambda: {"s": 0.5}):
        raise error


def test_losses():
    loss = torch.tensor(2.0)
    assert finite(loss) is loss
    with (
        pytest.raises(ValueError, match=r"The loss of these 3 rows is -inf at s = 0\."),
        explained(GOOD, GOOD, lambda: {"s": 0.0}),
    ):
        finite(torch.tensor(-torch.inf))


def test_one_number():
    assert [one_number(x) for x in (3, 2.5, np.float32(0.5), torch.tensor([4.0]))] == [3.0, 2.5, 0.5, 4.0]
    for bad, said in ((GOOD, r"a tensor of shape \(3,\)"), ("3", "'3'"), (torch.tensor([torch.nan]), "nan")):
        with pytest.raises(TypeError, match=f"must be one finite number, .* got {said}"):
            one_number(bad)
