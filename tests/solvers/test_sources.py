"""What is reduced: its matrix, its size, and whether two are the same."""

import pytest
import torch
from torch import Tensor

from openreml_nn.solvers import sources
from openreml_nn.solvers.sources import Source, known

generator = torch.Generator().manual_seed(9)
W, Z = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (5, 4))
K, D = W.mT @ W, torch.tensor([3.0, 0.0, 1.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
SEEN = D > 0
ROOT = D[SEEN].sqrt()
CASES: dict[str, tuple[Source, Tensor]] = {
    "kernel": (Source("kernel", (K, torch.ones_like(D))), K),
    "counts": (Source("kernel", (K, D)), ROOT[:, None] * K[SEEN][:, SEEN] * ROOT),
    "single precision": (Source("kernel", (K.float(), D)), ROOT[:, None] * K.float().double()[SEEN][:, SEEN] * ROOT),
    "no level": (Source("kernel", (K, 0.0 * D)), K[:0, :0]),
    "inner": (Source("inner", (W.mT,)), W @ W.mT),
    "outer": (Source("outer", (W.float(),)), W.float().double() @ W.float().double().mT),
    "sandwich": (Source("sandwich", (Z, K.float())), Z @ K.float().double() @ Z.mT),
}


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("name", CASES)
def test_matrix(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the lower triangle, of which blocks on the diagonal are whole; it is nobody else's."""
    monkeypatch.setattr(sources, "BLOCK", block)
    source, expected = CASES[name]
    A = source.matrix()
    assert source.size == len(A) == len(expected)
    torch.testing.assert_close(A.tril(), expected.tril())
    before = [None if x is None else x.clone() for x in source.tensors]
    A.fill_(7.0)
    assert source.same(Source(source.kind, tuple(before)))


def test_levels_with_records() -> None:
    assert CASES["counts"][0].observed.tolist() == [0, 2, 3, 5, 6]
    alone = Source("kernel", (None, D))
    assert alone.size == 5
    with pytest.raises(ValueError, match="no matrix of its own"):
        alone.matrix()
    with pytest.raises(ValueError, match="no matrix of its own"):
        known(None)
    assert known(K) is K


def test_the_same_where_their_matrices_are() -> None:
    source = CASES["counts"][0]
    assert source.same(source)
    assert source.same(Source("kernel", (K.clone(), D.clone())))
    others = [("kernel", (K, D + 1.0)), ("kernel", (2.0 * K, D)), ("sandwich", (K, D)), ("kernel", (None, D)),
              ("kernel", (K[:6, :6], D[:6]))]  # fmt: skip
    for kind, tensors in others:
        assert not source.same(Source(kind, tensors))
        assert not Source(kind, tensors).same(source)
