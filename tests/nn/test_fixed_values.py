"""What a covariance has fixed, in short."""

import torch

from openreml_nn.covariance import IdentityMatrix, KnownMatrix, KroneckerProduct, ScalarMatrix, UnstructuredMatrix
from openreml_nn.nn.fixed_values import differing, fixed_values

M = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
K = M @ M.mT


def test_another_kernel_differs():
    own = fixed_values(KnownMatrix(K))
    assert list(own) == ["K"]
    assert differing(own, fixed_values(KnownMatrix(K * (1.0 + 1e-14)))) == []
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    for other in (K * (1.0 + 1e-6), K[order][:, order]):
        assert differing(own, fixed_values(KnownMatrix(other))) == ["K"]
    slopes = KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(K))
    assert len(fixed_values(slopes)) == 1


def test_thetas_are_not_fixed():
    assert fixed_values(ScalarMatrix(3)) == {}
    assert fixed_values(KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(3))) == {}
    assert fixed_values(KnownMatrix(K).to("meta")) == {}
