r"""The prior N(0, G(θ)) of random effects: what a divergence from it asks of G⁻¹.

That is a product, the blocks of the levels and log|G|. They are cheap where the levels are independent, and come from
the Cholesky factor of each Kronecker factor where they are not; what θ does not change is inverted once. Effects are
here by level, shape (q, s, …) for s effects of q levels.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce

import torch
from torch import Tensor

from openreml_nn.covariance import KroneckerProduct, Matrix
from openreml_nn.nn.dtypes import KeepsDtype
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.spectral_form import scale_of, scaled

MATRICES_AT_PEAK = 8  # a Cholesky factor, an inverse, what autograd keeps, gradients and the memory of an optimiser


class Precision(ABC):
    """G⁻¹ at given thetas.

    Attributes:
        logdet_G: log|G|.
    """

    logdet_G: Tensor

    @abstractmethod
    def blocks(self) -> Tensor:
        """The block of each level, shape (q, s, s), or (1, s, s) where all levels share it."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """G⁻¹ x for x of shape (q, s, k)."""


class LevelPrecision(Precision):
    """Of independent levels, by their blocks of G, shape (q, s, s), or (1, s, s) where all share one."""

    def __init__(self, G: Tensor, levels: int) -> None:
        L = cholesky(G)
        self._blocks = torch.cholesky_inverse(L)
        self.logdet_G = (levels // len(G)) * _logdet(L)

    def blocks(self) -> Tensor:
        return self._blocks

    def times(self, x: Tensor) -> Tensor:
        return self._blocks @ x


class KroneckerPrecision(Precision):
    """Of G = A ⊗ B ⊗ …, or of a single factor, by the inverses of the factors and the log-determinants of these."""

    def __init__(self, inverses: list[Tensor], logdets: list[Tensor], levels: int) -> None:
        self.inverses, self.levels = inverses, levels
        self.size = math.prod(map(len, inverses))
        self.logdet_G = torch.stack([self.size // len(P) * d for P, d in zip(inverses, logdets, strict=True)]).sum()

    def blocks(self) -> Tensor:
        q = self.levels
        place = torch.arange(self.size, device=self.logdet_G.device).reshape(-1, q).mT  # of effect a of level l
        rows, columns = place[:, :, None], place[:, None, :]
        pieces = []
        for P in reversed(self.inverses):
            pieces.append(P[rows % len(P), columns % len(P)])
            rows, columns = rows // len(P), columns // len(P)
        return reduce(torch.mul, pieces)

    def times(self, x: Tensor) -> Tensor:
        q, s, k = x.shape
        x, before = x.transpose(0, 1), 1
        for P in self.inverses:
            x = P @ x.reshape(before, len(P), -1)
            before *= len(P)
        return x.reshape(s, q, k).transpose(0, 1)


class Prior(KeepsDtype):
    """What the precision of a G needs and θ does not change: inverses of fixed factors, kept as buffers.

    Args:
        G: Covariance of the effects.
        levels: Number of levels q.

    Raises:
        NotPositiveDefinite: A fixed factor is singular.
        MemoryError: A dense factor does not fit.
    """

    def __init__(self, G: Matrix, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self._fixed: list[bool] = []
        if self._level_blocks(G) is not None:
            return
        sizes = [factor.shape[0] for factor, _ in _factors(G)]
        what = f"The precision of correlated effects ({max(sizes)} x {max(sizes)})"
        needed = 8 * MATRICES_AT_PEAK * sum(n * n for n in sizes)
        require_memory(needed, G.theta.device, what, "Take independent levels, or fewer of them.")
        for i, (factor, _) in enumerate(_factors(G)):
            form = scaled(factor)
            self._fixed.append(form is not None)
            if form is not None:
                K = torch.eye(factor.shape[0], dtype=torch.float64) if form.K is None else form.K.to(torch.float64)
                L = cholesky(K)
                self.register_buffer(f"inverse_{i}", torch.cholesky_inverse(L), persistent=False)
                self.register_buffer(f"logdet_{i}", _logdet(L), persistent=False)

    def precision(self, G: Matrix) -> Precision:
        """G⁻¹ at the thetas of G, differentiable in them.

        Raises:
            NotPositiveDefinite: G has no Cholesky factor.
        """
        blocks = self._level_blocks(G)
        if blocks is not None:
            return LevelPrecision(blocks, self.levels)
        inverses, logdets = [], []
        for i, (factor, own) in enumerate(_factors(G)):
            if self._fixed[i]:
                c = scale_of(factor, own)
                inverses.append(self.get_buffer(f"inverse_{i}").to(c) / c)
                logdets.append(self.get_buffer(f"logdet_{i}").to(c) + factor.shape[0] * c.log())
            else:
                L = cholesky(factor.build(own))
                inverses.append(torch.cholesky_inverse(L))
                logdets.append(_logdet(L))
        return KroneckerPrecision(inverses, logdets, self.levels)

    def _level_blocks(self, G: Matrix) -> Tensor | None:
        common = G.common_block(G.theta, self.levels)
        return G.level_blocks(G.theta, self.levels) if common is None else common[None]


def _factors(G: Matrix) -> list[tuple[Matrix, Tensor]]:
    if isinstance(G, KroneckerProduct) and all(A.shape[0] == A.shape[1] for A in G.operand_list()):
        return G.parts(G.theta)
    return [(G, G.theta)]


def cholesky(G: Tensor) -> Tensor:
    """Cholesky factor of a covariance of random effects, or of several.

    Raises:
        NotPositiveDefinite: There is none.
    """
    L, failed = torch.linalg.cholesky_ex(G)
    if bool(failed.any()):
        raise NotPositiveDefinite(
            "The covariance of random effects is not positive definite, so that the divergence from it is infinite. Is "
            "a variance zero? A kernel must be positive definite here; of a singular one, K = WW', take the columns of "
            "W as effects."
        )
    return L


def _logdet(L: Tensor) -> Tensor:
    return 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum()
