"""A covariance structure of one's own in ten lines: names, transforms and a formula; all else follows from them.

A random walk observed with noise, V = σ²_walk min(i, j) + σ²_noise I, a structure that is in no menu.
"""

import torch
from torch import Tensor

from openreml_nn import fit
from openreml_nn.covariance import Matrix, ScalarMatrix, Sum
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.testing import check_matrix


class RandomWalkMatrix(Matrix):
    r"""V_ij = σ² min(i, j), i and j from 1."""

    def __init__(self, n: int) -> None:
        super().__init__((n, n), ["sigma^2"], [TransformExpPow2()])

    def build(self, params: Tensor) -> Tensor:
        t = torch.arange(1, self.shape[0] + 1, dtype=params.dtype, device=params.device)
        return self.trans_params(params) * torch.minimum(t[:, None], t)


check_matrix(RandomWalkMatrix(6))  # every law of the contract: derivatives, copies, vmap, checkpoints

torch.manual_seed(1)
walk = torch.randn(150, dtype=torch.float64).cumsum(0)
y = walk + 2.0 * torch.randn(150, dtype=torch.float64)
result = fit(Sum(walk=RandomWalkMatrix(150), noise=ScalarMatrix(150)), y)
print(result)
