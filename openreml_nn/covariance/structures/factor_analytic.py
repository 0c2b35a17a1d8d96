"""Factor-analytic covariance: a few common factors and a specific variance for each level."""

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from openreml_nn.covariance.levels import labels_of, size_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import TransformExpPow2, TransformScaleShift


class FactorAnalyticMatrix(Matrix):
    r"""V = Λ Λ' + Ψ, Λ of shape (n, k) with zeros above its diagonal, Ψ diagonal and positive.

    The zeros make Λ unique up to the sign of its columns; a report shows each column's first loading as positive.
    The raw start 0 is Λ_i0 = 1 and Λ_if = ±½ for further factors, because the likelihood is flat at Λ = 0.

    Args:
        n: Size, or `Levels`, whose labels then name loadings and specific variances.
        k: Number of factors, less than n.
        start: Start values by name.

    Raises:
        ValueError: k is below 1 or not below n.

    Source: Thompson, Cullis, Smith & Gilmour (2003), Australian & New Zealand Journal of Statistics 45, 445-459.

    Example:
        >>> from openreml_nn.covariance import FactorAnalyticMatrix, Levels
        >>> V = FactorAnalyticMatrix(Levels(["a", "b", "c"]), k=1)
        >>> V.param_names
        ['lambda_a', 'lambda_b', 'lambda_c', 'psi_a', 'psi_b', 'psi_c']
        >>> V.loadings().shape
        torch.Size([3, 1])
    """

    place: Tensor

    def __init__(self, n: SupportsIndex, k: int = 1, *, start: Any = None) -> None:
        size = size_of(n, "FactorAnalyticMatrix")
        if not 1 <= k < size:
            raise ValueError(f"`FactorAnalyticMatrix` needs 1 <= k < n, got k = {k} and n = {size}.")
        labels = labels_of(n, size)
        entries = [(i, f) for f in range(k) for i in range(f, size)]
        names = [f"lambda_{labels[i]}" if k == 1 else f"lambda_{labels[i]}_{f}" for i, f in entries]
        shift = [1.0 if f == 0 else 0.5 * (-1.0) ** (i // f) for i, f in entries]
        trans = [*(TransformScaleShift(1.0, s) for s in shift), *([TransformExpPow2()] * size)]
        super().__init__((size, size), names + [f"psi_{label}" for label in labels], trans, start=start)
        self.k = k
        self.register_buffer("place", torch.tensor([i * k + f for i, f in entries]), persistent=False)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        values = self.trans_params(params)
        size, count = self.shape[0], len(self.place)
        loadings = values.new_zeros(size * self.k).scatter(0, self.place, values[:count])
        return loadings.reshape(size, self.k), values[count:]

    def loadings(self, params: Tensor | None = None) -> Tensor:
        """Λ, shape (n, k), each column's first loading positive."""
        L, _ = self._split(self._flat(params))
        return L * torch.where(L.diagonal() < 0, -1.0, 1.0)

    def specific_variances(self, params: Tensor | None = None) -> Tensor:
        """The diagonal of Ψ, shape (n,)."""
        return self._split(self._flat(params))[1]

    def build(self, params: Tensor) -> Tensor:
        L, psi = self._split(params)
        return L @ L.mT + torch.diag_embed(psi)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        L, psi = self._split(params)
        return L @ (L.mT @ rhs) + psi[:, None] * rhs

    def natural(self, params: Tensor) -> Tensor:
        return torch.cat([self.loadings(params).reshape(-1)[self.place], self.specific_variances(params)])

    @property
    def scale_powers(self) -> list[float]:
        return [0.5] * len(self.place) + [1.0] * self.shape[0]
