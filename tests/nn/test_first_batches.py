"""What the first two batches of a training tell; that a head asks it is in test_marginal.py."""

import warnings

import pytest
import torch

from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead
from openreml_nn.nn.first_batches import warn_of_mean, warn_of_variance


def test_a_mean_far_from_zero():
    y = torch.linspace(-1.0, 1.0, 20)
    for r in (y, y + 1.5, torch.full((20,), 1.5), y[:9] + 100.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_mean(r, y[: len(r)])
    with pytest.warns(
        UserWarning,
        match=r"with y \+10 away .* 16.1 standard deviations of y.* `head.start.y, groups.`.* `head.offset = y.mean",
    ):
        warn_of_mean(y + 10.0, y + 10.0)


@pytest.mark.parametrize(
    ("r", "y", "enough", "said"),
    [(4.0, 4.0, True, "16"), (0.2, 0.2, True, "0.04"), (3.0, 3.0, True, None), (0.4, 0.4, True, None),
     (0.2, 0.2, False, None), (4.0, 4.0, False, "16"), (1.0, 4.0, True, None), (4.0, 1.0, True, None),
     (0.2, 1.0, True, None), (0.0, 0.0, True, None)],
)  # fmt: skip
def test_a_variance_far_from_that_of_the_parameters(r, y, enough, said):
    """Both y and what the network leaves of it must be far, on the same side; a small one needs levels enough."""
    unit = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit = unit / unit.std()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_variance(r * unit, y * unit + 5.0, 1.0, enough)
        warn_of_variance(r * unit[:9], y * unit[:9], 1.0, enough)  # too few rows
    assert len(found) == (said is not None)
    if said:
        assert f"has a variance of {said}, and random effects and residual have one of 1 together" in str(
            found[0].message
        )
        assert "Before the training call `head.start(y, groups)`" in str(found[0].message)


CODES = {"a": torch.arange(60) % 6, "b": torch.arange(60) // 10}
Y = torch.randn(60, generator=torch.Generator().manual_seed(7))


def trained(batches, names=("a",), **options):
    """The losses of a head on batches of rows."""
    head = MixedModelHead({name: Effects(6) for name in names}, **options)
    output = torch.zeros(60, 1) if options.get("mode") != "features" else torch.randn(60, 1)
    for rows in batches:
        head(output[rows], Y[rows], {name: CODES[name][rows] for name in names})


@pytest.mark.parametrize("mode", ["batch", "features"])
def test_torn_clusters(mode):
    halves = torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(30)
    with pytest.warns(UserWarning, match="different rows of the same levels of 'a', as .*ClusterBatchSampler") as said:
        trained([*halves, *halves], mode=mode)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="of the same levels of 'a', 'b'"):
        trained(halves, ("a", "b"), mode=mode)


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_whole_clusters_of_one_factor_and_all_rows_are_fine(names):
    by_cluster = list(ClusterBatchSampler(CODES["a"], 20))
    everything = [torch.arange(60), torch.randperm(60)]
    again = [by_cluster[0], by_cluster[0][::-1]]  # a small cluster that is drawn twice
    for batches in (by_cluster, everything, again):
        trained(batches, names)
    with torch.no_grad():
        trained([torch.arange(30) * 2, torch.arange(30)], names)


def test_a_head_that_has_seen_two_batches_holds_nothing():
    head = MixedModelHead({"a": Effects(6)})
    for _ in range(2):
        assert not head._first.done
        head(torch.zeros(60), Y, CODES["a"])
    assert head._first.done
    assert head._first._before is None


def test_a_first_batch_of_one_row_tells_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_mean(torch.tensor([300.0]), torch.tensor([300.0]))
