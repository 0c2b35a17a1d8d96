r"""Gaussian posteriors q(b) = N(m, S) of random effects, and their divergence from the prior N(0, G).

    KL(q || p) = ½ [tr(G⁻¹S) + m'G⁻¹m − qs + log|G| − log|S|]

is in closed form for every S and G. Effects are here by level, shape (q, s, …) for s effects of q levels.
S = D U (D U)', D = diag(exp(log_scale)) and U unit lower triangular, so that log|S| is a sum and the entries below the
diagonal have no unit.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from openreml_nn.nn.prior import MATRICES_AT_PEAK, Precision
from openreml_nn.solvers.memory import require_memory


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
