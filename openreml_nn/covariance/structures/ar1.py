"""First-order autoregressive covariance over equally spaced times, gaps allowed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.levels import values_of
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.transform import (
    Transform,
    TransformChain,
    TransformExpPow2,
    TransformScaleShift,
    TransformSigmoid,
)


class AR1Matrix(Matrix):
    r"""V_ij = σ² ρ^|t_i − t_j|, −1 < ρ < 1, or 0 < ρ < 1 where all lags are even and the sign of ρ does not count.

    Args:
        times: Number of consecutive times, or the integer times themselves (array-like or `Levels`); gaps count.
        start: Start values of σ² and ρ.

    Raises:
        ValueError: Times are not integers or repeat.

    Example:
        >>> from openreml_nn.covariance import AR1Matrix
        >>> V = AR1Matrix([2001, 2002, 2005], start={"sigma^2": 2.0, "rho": 0.5})
        >>> V.param_names
        ['sigma^2', 'rho']
        >>> V().detach()[0].tolist()
        [2.0, 1.0, 0.125]
    """

    lags: Tensor
    lag_bits: Tensor
    lag_index: Tensor

    def __init__(self, times: Any, *, start: Any = None) -> None:
        t = values_of(range(int(times)) if isinstance(times, (int, np.integer)) else times, "AR1Matrix")
        if t.shape[1] != 1 or not torch.equal(t, t.round()):
            raise ValueError(
                "`AR1Matrix` needs integer times in one column; for other distances take `ExponentialMatrix`."
            )
        if len(t.unique()) != len(t):
            raise ValueError("`AR1Matrix` needs times that differ; two observations of one group have the same time.")
        lags, index = torch.cdist(t, t, p=1.0).to(torch.int64).unique(return_inverse=True)
        super().__init__((len(t), len(t)), ["sigma^2", "rho"], [TransformExpPow2(), _range_of_rho(lags)], start=start)
        bits = torch.arange(int(lags[-1]).bit_length(), device=lags.device)
        self.register_buffer("lags", lags, persistent=False)
        self.register_buffer("lag_bits", (lags >> bits[:, None]) % 2 == 1, persistent=False)
        self.register_buffer("lag_index", index, persistent=False)

    def _by_lag(self, params: Tensor) -> Tensor:
        """The covariance at each of ``lags``."""
        sigma2, rho = self.trans_params(params)
        return sigma2 * _power(rho, self.lag_bits)

    def build(self, params: Tensor) -> Tensor:
        return self._by_lag(params)[self.lag_index]

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._by_lag(params)[self.lag_index[rows][:, columns]]

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._by_lag(params)[self.lag_index[rows, columns]]

    def diagonal(self, params: Tensor) -> Tensor:
        return self.trans_params(params)[:1].expand(self.shape[0])


def _range_of_rho(lags: Tensor) -> Transform:
    """ρ between −1 and 1, from 0 on if all lags are even, where its sign makes no difference.

    The likelihood is flat at ρ = 0 if there is no lag of 1, so that the raw 0 is another ρ then.
    """
    if not bool((lags % 2).any()):
        return TransformSigmoid(0.0, 1.0)
    ends = TransformSigmoid(-1.0, 1.0)
    return ends if bool((lags == 1).any()) else TransformChain([TransformScaleShift(1.0, 1.0), ends])


def _power(base: Tensor, bits: Tensor) -> Tensor:
    """``base`` to m integer exponents by squaring; their bits are of shape (number of bits, m), the lowest first.

    A polynomial has all its derivatives at 0, in every mode of autograd; those of ``torch.pow`` are NaN there.
    """
    result = base.new_ones(bits.shape[1])
    for b, odd in enumerate(bits):
        base = base * base if b else base
        result = torch.where(odd, result * base, result)
    return result
