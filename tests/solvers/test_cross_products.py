"""Rows of no level, and covariates of zero, among the cross-products."""

from collections.abc import Callable

import pytest
import torch

from openreml_nn import REML
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, KhatriRaoMatrix, ScalarMatrix, Sum
from openreml_nn.solvers import orders
from openreml_nn.solvers.band_layout import BandLayout
from openreml_nn.solvers.mixed_model_equations import MixedModelEquationsSolver

generator = torch.Generator().manual_seed(2)


def trial(plots: int, share: float) -> tuple[Sum, torch.Tensor]:
    """Genotypes of two plots each in blocks of three; a share of the plots has no genotype, or no block, or neither."""
    plot = torch.arange(plots)
    genotype, block = plot // 2, (plot // 2 + 7 * (plot % 2)) % (plots // 3)
    designs = {}
    for name, code in (("genotype", genotype), ("block", block), ("pair", plot // 4)):
        unknown = torch.rand(plots, generator=generator) < share
        labels = [str(i) for i in range(int(code.max()) + 1)]
        designs[name] = DummyMatrix([str(i) for i in torch.where(unknown, -1, code).tolist()], levels=labels,
                                    unknown="zero")  # fmt: skip
    x = torch.randn(plots, 1, generator=generator) * (torch.rand(plots, 1, generator=generator) > 0.2)
    designs["slope"] = KhatriRaoMatrix(x, DummyMatrix(block), ["x"])
    terms = {name: CovariancePropagation(Z, ScalarMatrix(Z.num_levels)) for name, Z in designs.items()}
    return Sum(terms | {"residual": ScalarMatrix(plots)}), torch.randn(plots, generator=generator).double()


@pytest.mark.parametrize("widest", [0, 128])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_equals_dense(
    share: float, widest: int, same_as_dense: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "CALL", 0)
    monkeypatch.setattr(orders, "WIDEST", widest)
    V, y = trial(180, share)
    theta = 0.5 * torch.randn(V.num_params, generator=generator, dtype=torch.float64)
    same_as_dense(V, theta, y, torch.ones(180, 1).double(), "mixed_model_equations", REML, tolerance=1e-10)


def test_rows_of_no_level_couple_nothing() -> None:
    layouts = []
    for share in (0.0, 0.2):
        V, y = trial(6000, share)
        layouts.append(MixedModelEquationsSolver().prepare(V, y).products.layout)
    assert all(isinstance(layout, BandLayout) for layout in layouts)
    assert layouts[1].length < 1.2 * layouts[0].length
