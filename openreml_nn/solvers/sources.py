"""What is reduced: a kernel over the levels with records, or a product of a design with itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.solvers.band import BLOCK


@dataclass(frozen=True)
class Source:
    """What was reduced.

    Attributes:
        kind: ``"kernel"``: √D K √D, K of size q (None for I) and D ≥ 0 of shape (q,), over the levels with D > 0;
            ``"inner"``: W'W; ``"outer"``: W W'; ``"sandwich"``: Z K Z'.
        tensors: The tensors of the formula.
    """

    kind: str
    tensors: tuple[Tensor | None, ...]

    def same(self, other: "Source") -> bool:
        """Whether both are the same matrix: the same tensors, or equal ones."""
        return self.kind == other.kind and all(map(_equal, self.tensors, other.tensors))

    @property
    def size(self) -> int:
        """Rows of A."""
        return len(self.observed) if self.kind == "kernel" else known(self.tensors[0]).shape[self.kind == "inner"]

    @property
    def observed(self) -> Tensor:
        """For a kernel the levels with D > 0."""
        return known(self.tensors[1]).nonzero()[:, 0]

    def matrix(self) -> Tensor:
        """A, of which the lower triangle counts; a tensor of its own."""
        first = known(self.tensors[0])
        if self.kind == "inner":
            return _lower_gram(first.mT)
        if self.kind == "outer":
            return _lower_gram(first)
        if self.kind == "sandwich":
            return first @ (known(self.tensors[1]).to(first) @ first.mT)
        keep, D = self.observed, known(self.tensors[1])
        whole = len(keep) == len(D)
        A = first.to(torch.float64, copy=True) if whole else first[keep][:, keep].to(torch.float64)
        root = D[keep].sqrt()
        return A if bool((root == 1.0).all()) else A.mul_(root).mul_(root[:, None])


def _lower_gram(W: Tensor) -> Tensor:
    """W W' up to blocks above the diagonal."""
    G = torch.zeros((len(W), len(W)), dtype=torch.float64, device=W.device)
    for c in range(0, len(W), BLOCK):
        G[c:, c : c + BLOCK] = W[c:].to(torch.float64) @ W[c : c + BLOCK].to(torch.float64).mT
    return G


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None or left is right:
        return left is right
    return left.shape == right.shape and left.device == right.device and torch.equal(left, right)


def known(tensor: Tensor | None) -> Tensor:
    """A tensor that is not left out.

    Raises:
        ValueError: It is.
    """
    if tensor is None:
        raise ValueError("A kernel of independent levels has no matrix of its own.")
    return tensor
