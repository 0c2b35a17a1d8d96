"""Which layout is chosen for elements in given places, and that it holds them; each element once."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers import orders
from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.borders import BorderedLayout
from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.layouts import DenseLayout
from openreml_nn.solvers.orders import choose_layout, distinct

SIZE = 1000
generator = torch.Generator().manual_seed(11)


def band(size: int, reach: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the lower triangle of a band matrix whose rows are in a random order."""
    i = torch.arange(size).repeat_interleave(reach + 1)
    j = i - torch.arange(reach + 1).repeat(size)
    order = torch.randperm(size, generator=generator)
    row, column = order[i[j >= 0]], order[j[j >= 0]]
    return torch.maximum(row, column), torch.minimum(row, column)


def hub(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The same elements, and an effect 0 that meets all others."""
    return torch.cat([row, torch.arange(SIZE)]), torch.cat([column, torch.zeros(SIZE, dtype=torch.int64)])


def test_a_band() -> None:
    layout = choose_layout(*band(SIZE, 5), SIZE)
    assert isinstance(layout, BandLayout)
    assert layout.length < SIZE**2 / 10
    assert "q = 1000 effects in a band of w = 16" in layout.cost


def test_a_chain_where_the_reach_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "WIDEST", 4)
    row, column = band(SIZE, 5)
    layout = choose_layout(row, column, SIZE)
    assert isinstance(layout, ChainLayout)
    assert layout.length < SIZE**2 / 10
    assert "chain of T = 33 blocks of b = 32" in layout.cost
    assert choose_layout(row.repeat(100), column.repeat(100), SIZE).cost == layout.cost


def test_a_border_of_an_effect_that_meets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "WIDEST", 4)
    row, column = band(SIZE, 5)
    layout = choose_layout(*hub(row, column), SIZE)
    assert isinstance(layout, BorderedLayout)
    assert layout.rows[-1] == 0
    assert "1000 effects, 1 of which meet many others" in layout.cost
    assert layout.work < choose_layout(row, column, SIZE).work * 1.2


def test_dense_where_elements_are_many_or_effects_few() -> None:
    every = torch.arange(SIZE**2)
    assert isinstance(choose_layout(every // SIZE, every % SIZE, SIZE), DenseLayout)
    assert isinstance(choose_layout(*band(400, 130), 400), DenseLayout)
    few = choose_layout(*band(60, 2), 60)
    assert isinstance(few, DenseLayout)
    assert "q = 60 effects" in few.cost


@pytest.mark.parametrize("size", [0, 1])
def test_no_effect_and_one(size: int) -> None:
    layout = choose_layout(torch.arange(size), torch.arange(size), size)
    assert isinstance(layout, DenseLayout)
    assert layout.dense(torch.ones(size * size, dtype=torch.float64)).shape == (size, size)


@pytest.mark.parametrize("kind", ["band", "chain", "border"])
def test_the_layout_holds_the_elements(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "band":
        monkeypatch.setattr(orders, "WIDEST", 4)
    row, column = band(SIZE, 5)
    if kind == "border":
        row, column = hub(row, column)
    row, column = distinct(row, column, SIZE)
    layout = choose_layout(row, column, SIZE)
    places = layout.place(row, column)
    values = torch.randn(len(row), generator=generator, dtype=torch.float64)
    A = torch.zeros(layout.length, dtype=torch.float64).index_copy_(0, places, values)
    lower = torch.zeros(SIZE, SIZE, dtype=torch.float64).index_put_((row, column), values)
    torch.testing.assert_close(layout.dense(layout.whole(A)), lower + lower.tril(-1).mT)


@pytest.mark.parametrize("repeats", [1, 40])
@pytest.mark.parametrize("size", [12, 300])
def test_each_element_once(repeats: int, size: int) -> None:
    """By marks and by sorting: the same pairs, in the same order."""
    row, column = (torch.randint(0, size, (30,), generator=generator).repeat(repeats) for _ in range(2))
    once = distinct(row, column, size)
    pairs = sorted(set(zip(row.tolist(), column.tolist(), strict=True)))
    assert list(zip(*(part.tolist() for part in once), strict=True)) == pairs
    none = distinct(row[:0], column[:0], size)
    assert [len(part) for part in none] == [0, 0]
