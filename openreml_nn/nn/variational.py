r"""Gaussian posteriors q(b) = N(m, S) of random effects, and their divergence from the prior N(0, G).

    KL(q || p) = ½ [tr(G⁻¹S) + m'G⁻¹m − qs + log|G| − log|S|]

is in closed form for every S and G. It asks of G⁻¹ a product and the blocks of the levels, which are cheap where the
levels are independent, and come from the Cholesky factor of each Kronecker factor where they are not.

Effects are here by level, shape (q, s, …) for s effects of q levels. S = D U (D U)', D = diag(exp(log_scale)) and U
unit lower triangular, so that log|S| is a sum and the entries below the diagonal have no unit.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce

import torch
from torch import Tensor, nn

from openreml_nn.covariance import KroneckerProduct, Matrix
from openreml_nn.nn.dtypes import KeepsDtype
from openreml_nn.solvers import NotPositiveDefinite
from openreml_nn.solvers.memory import require_memory
from openreml_nn.solvers.spectral_form import scale_of, scaled

MATRICES_AT_PEAK = 8  # a Cholesky factor, an inverse, what autograd keeps, gradients and the memory of an optimiser

# ---- the prior -------------------------------------------------------------------------------------------------------


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


# ---- the posteriors --------------------------------------------------------------------------------------------------


class GaussianPosterior(nn.Module, ABC):
    """q(b) = N(m, S); a subclass says which effects S correlates.

    Args:
        scale: Standard deviations to start from, shape (q, s).

    Attributes:
        mean: m, shape (q, s).
        log_scale: Logarithm of the diagonal of D, shape (q, s).
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros_like(scale))
        self.log_scale = nn.Parameter(scale.log())

    @abstractmethod
    def deviation(self, codes: Tensor, design: Tensor | None) -> Tensor:
        """Standard deviation of z'b of each row, shape (m,); of b itself, for one effect, without a design."""

    @abstractmethod
    def deviations(self) -> Tensor:
        """Standard deviation of each effect, shape (q, s)."""

    @abstractmethod
    def noise(self, codes: Tensor, shared: bool) -> Tensor:
        """b − m of the level of each row, drawn anew for each, or, if ``shared``, once for all; shape (m, s)."""

    @abstractmethod
    def trace(self, precision: Precision) -> Tensor:
        """tr(G⁻¹S)."""

    def kl(self, precision: Precision) -> Tensor:
        """KL(q || N(0, G)), in the dtype of G."""
        m = self.mean.to(precision.logdet_G)[..., None]
        quadratic = (m * precision.times(m)).sum()
        logdet_S = 2.0 * self.log_scale.to(m).sum()
        return 0.5 * (self.trace(precision) + quadratic - m.numel() + precision.logdet_G - logdet_S)


class MeanField(GaussianPosterior):
    """S diagonal: q·s standard deviations."""

    def deviation(self, codes: Tensor, design: Tensor | None) -> Tensor:
        scale = self.log_scale[codes].exp()
        return scale[:, 0] if design is None else torch.linalg.vector_norm(design * scale, dim=1)

    def deviations(self) -> Tensor:
        return self.log_scale.exp()

    def noise(self, codes: Tensor, shared: bool) -> Tensor:
        return self.log_scale[codes].exp() * _normal(self.mean, codes, self.mean.shape[1], shared)

    def trace(self, precision: Precision) -> Tensor:
        P = precision.blocks().diagonal(dim1=1, dim2=2)
        return (P * (2.0 * self.log_scale.to(P)).exp()).sum()


class _Correlated(GaussianPosterior):
    """Base class of an S with rows of D U."""

    below: nn.Parameter

    @abstractmethod
    def roots(self, codes: Tensor) -> Tensor:
        """The rows of D U of each given level, shape (m, s, k)."""

    def deviation(self, codes: Tensor, design: Tensor | None) -> Tensor:
        roots = self.roots(codes)
        rows = roots[:, 0] if design is None else (design[:, None] @ roots)[:, 0]
        return torch.linalg.vector_norm(rows, dim=1)

    def deviations(self) -> Tensor:
        return torch.linalg.vector_norm(self.roots(_all(self.mean)), dim=2)


class Block(_Correlated):
    """S block diagonal: the s effects of a level are correlated, levels are not."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__(scale)
        q, s = scale.shape
        self.below = nn.Parameter(scale.new_zeros(q, s * (s - 1) // 2))

    def roots(self, codes: Tensor) -> Tensor:
        U = _unit_lower(self.below[codes], self.mean.shape[1])
        return self.log_scale[codes].exp()[:, :, None] * U

    def noise(self, codes: Tensor, shared: bool) -> Tensor:
        draws = _normal(self.mean, codes, self.mean.shape[1], shared)
        return (self.roots(codes) @ draws[:, :, None])[:, :, 0]

    def trace(self, precision: Precision) -> Tensor:
        P = precision.blocks()
        roots = self.roots(_all(self.mean)).to(P)
        return ((P @ roots) * roots).sum()


class Full(_Correlated):
    """S with all q·s effects correlated: (q·s)² / 2 numbers.

    Raises:
        MemoryError: They do not fit.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__(scale)
        n = scale.numel()
        what = f"A full posterior of {n} effects ({MATRICES_AT_PEAK} matrices of {n} x {n} in training)"
        require_memory(8 * MATRICES_AT_PEAK * n * n, scale.device, what, "Take posterior='block' or 'mean_field'.")
        self.below = nn.Parameter(scale.new_zeros(n * (n - 1) // 2))

    def _root(self) -> Tensor:
        U = _unit_lower(self.below, self.mean.numel())
        return (self.log_scale.exp().reshape(-1, 1) * U).reshape(*self.mean.shape, -1)

    def roots(self, codes: Tensor) -> Tensor:
        return self._root()[codes]

    def noise(self, codes: Tensor, shared: bool) -> Tensor:
        n = self.mean.numel()
        if shared:
            return (self._root() @ torch.randn(n, dtype=self.mean.dtype, device=self.mean.device))[codes]
        return (self.roots(codes) @ _normal(self.mean, codes, n, shared=False)[:, :, None])[:, :, 0]

    def trace(self, precision: Precision) -> Tensor:
        root = self._root().to(precision.logdet_G)
        return (root * precision.times(root)).sum()


POSTERIORS: dict[str, type[GaussianPosterior]] = {"mean_field": MeanField, "block": Block, "full": Full}
"""Posteriors by name."""


def _all(mean: Tensor) -> Tensor:
    return torch.arange(len(mean), device=mean.device)


def _normal(like: Tensor, codes: Tensor, width: int, shared: bool) -> Tensor:
    """Standard normal numbers for each row, shape (m, width); if ``shared`` the same for rows of one level."""
    if not shared:
        return torch.randn(len(codes), width, dtype=like.dtype, device=like.device)
    levels, place = codes.unique(return_inverse=True)
    return torch.randn(len(levels), width, dtype=like.dtype, device=like.device)[place]


def _unit_lower(below: Tensor, size: int) -> Tensor:
    """Unit lower triangular matrices from their entries below the diagonal, row by row."""
    rows, columns = torch.tril_indices(size, size, -1, device=below.device)
    place = (rows * size + columns).expand(below.shape)
    strict = below.new_zeros(*below.shape[:-1], size * size).scatter(-1, place, below)
    return strict.unflatten(-1, (size, size)) + torch.eye(size, dtype=below.dtype, device=below.device)
