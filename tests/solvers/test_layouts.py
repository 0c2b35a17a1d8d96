"""Dense, banded and chained symmetric matrices against a plain one."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.borders import BorderedLayout
from openreml_nn.solvers.chains import ChainLayout
from openreml_nn.solvers.layouts import DenseLayout, Layout

generator = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def band(size: int, reach: int, cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the lower triangle of a band matrix, in parts of ``cut`` rows, and the order of its rows."""
    i = torch.arange(size).repeat_interleave(reach + 1)
    j = i - torch.arange(reach + 1).repeat(size)
    keep = (j >= 0) & (i // cut == j // cut)
    order = torch.randperm(size, generator=generator)
    row, column = order[i[keep]], order[j[keep]]
    return torch.maximum(row, column), torch.minimum(row, column), order


CASES = {  # size, reach, cut, width of a block
    "one chain": (50, 4, 50, 4),
    "full blocks": (45, 9, 45, 9),
    "parts that are not connected": (40, 6, 11, 7),
    "blocks that are not full": (41, 3, 41, 8),
    "two blocks in three places": (12, 6, 12, 6),
    "three blocks": (17, 5, 17, 7),
    "a diagonal": (23, 0, 23, 4),
    "one block": (6, 3, 6, 8),
    "a border": (30, 3, 30, 5),
    "a border of parts": (38, 4, 9, 6),
}
BORDER = 4  # rows of the border, where there is one


def bordered(size: int, row: Tensor, column: Tensor, order: Tensor, width: int) -> tuple[Tensor, Tensor, Layout]:
    """More rows, which have elements in all columns, shuffled among the others."""
    whole = size + BORDER
    shuffled = torch.randperm(whole, generator=generator)
    extra = torch.arange(size, whole)
    i, j = (place.flatten() for place in torch.meshgrid(extra, torch.arange(whole), indexing="ij"))
    row, column = torch.cat([row, i[j <= i]]), torch.cat([column, j[j <= i]])
    among, place = shuffled[:size].sort()[0], torch.empty(size, dtype=torch.int64)
    place[shuffled[:size].argsort()] = torch.arange(size)  # of each row of the chain in the order of A
    layout = BorderedLayout(ChainLayout(place[order], width), shuffled[size:], whole)
    assert torch.equal(layout.rows[:size], among)
    row, column = shuffled[row], shuffled[column]
    return torch.maximum(row, column), torch.minimum(row, column), layout


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[list[tuple[Layout, Tensor]], Tensor, tuple[Tensor, Tensor]]:
    """Layouts with one matrix given by its lower triangle, the matrix itself, and where its elements are."""
    size, reach, cut, width = CASES[request.param]
    row, column, order = band(size, reach, cut)
    layouts: list[Layout] = [ChainLayout(order, width), BandLayout(order, width)]
    if "border" in request.param:
        row, column, with_border = bordered(size, row, column, order, width)
        layouts = [with_border]
    value, given = normal(len(row)), []
    for own in (DenseLayout(layouts[0].size), *layouts):
        A = torch.zeros(own.length, dtype=torch.float64).index_add_(0, own.place(row, column), value)
        given.append((own, A))
    M = torch.zeros(own.size, own.size, dtype=torch.float64)
    M[row, column] = value
    return given, M + M.mT - torch.diag(M.diagonal()), (row, column)


def test_matrix(case) -> None:  # type: ignore[no-untyped-def]
    given, M, _ = case
    x = normal(len(M), 3)
    for layout, A in given:
        torch.testing.assert_close(layout.dense(A), M)
        torch.testing.assert_close(layout.dense(layout.whole(A)), M)
        torch.testing.assert_close(layout.matrix(layout.whole(A)) @ x, M @ x)
        torch.testing.assert_close(layout.diagonal(A), M.diagonal())
        torch.testing.assert_close(layout.row_sums(A), M.sum(1))
        for block in layout.blocks(layout.whole(A))[0] if isinstance(layout, ChainLayout) else ():
            assert torch.equal(block, block.mT)


def test_factor(case) -> None:  # type: ignore[no-untyped-def]
    given, M, (row, column) = case
    added = 4.0 + M.abs().sum(1)
    inverse, x = torch.linalg.inv(M + torch.diag(added)), normal(len(M), 3)
    for layout, A in given:
        layout.set_diagonal(A, M.diagonal() + added)
        kept = A.clone()
        factor = layout.factor(A)
        assert torch.equal(A, kept)
        torch.testing.assert_close(factor.pivots.log().sum(), -torch.logdet(inverse), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factor.solve(x), inverse @ x, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(factor.dense_inverse(), inverse, rtol=1e-12, atol=1e-14)
        found = factor.inverse()
        torch.testing.assert_close(found[layout.place(row, column)], inverse[row, column], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layout.whole(found), found, rtol=1e-12, atol=1e-16)


def test_rows_of_other_scales(case) -> None:  # type: ignore[no-untyped-def]
    """An added 1e120 leaves the other rows what they are, and keeps its own digits: the limit of a zero variance."""
    given, M, _ = case
    added, far = 4.0 + M.abs().sum(1), torch.arange(len(M)) % 3 == 0
    added[far] = 1e120
    scale = torch.ones_like(added).masked_fill(far, 1e60)
    x = normal(len(M), 2) * scale[:, None]
    D = torch.where(far[:, None] | far, 0.0, M) + torch.diag(added.where(~far, 1.0))
    expected = torch.linalg.solve(D, x / scale[:, None])
    for layout, A in given:
        layout.set_diagonal(A, M.diagonal() + added)
        factor = layout.factor(A)
        torch.testing.assert_close(factor.solve(x) * scale[:, None], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close((factor.pivots / scale**2).log().sum(), torch.logdet(D), rtol=1e-12, atol=1e-12)


def test_not_positive_definite(case) -> None:  # type: ignore[no-untyped-def]
    given, M, _ = case
    for layout, A in given:
        for row in (0, len(M) // 2):
            added = 4.0 + M.abs().sum(1)
            added[row] = -1e3
            layout.set_diagonal(A, M.diagonal() + added)
            with pytest.raises(torch.linalg.LinAlgError):
                layout.factor(A)
