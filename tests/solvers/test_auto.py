"""The choice of a solver: that of several processes is the one that a single process makes."""

import numpy as np
import pytest
import torch

from openreml_nn.covariance import CovariancePropagation, DummyMatrix, Matrix, ScalarMatrix, Sum
from openreml_nn.solvers import choose_shared, choose_solver
from openreml_nn.solvers.ranks import Alone

N = 420
ROW = np.arange(N)
SHUFFLED = np.random.default_rng(0).permutation(N)


class OneOfTwo(Alone):
    """The first of two processes, of which the second one has no rows."""

    size = 2


def simple(codes: np.ndarray) -> CovariancePropagation:
    Z = DummyMatrix(torch.from_numpy(codes))
    return CovariancePropagation(Z, ScalarMatrix(Z.num_levels))


def in_blocks(seed: int) -> np.ndarray:
    """40 levels, shuffled, in each block of 60 rows."""
    return np.unique(60 * (ROW // 60) + np.random.default_rng(seed).permutation(N) % 40, return_inverse=True)[1]


CASES: dict[str, tuple[str, list[np.ndarray]]] = {
    "few effects beside the largest term": ("mixed_model_equations", [ROW // 3, ROW % 7]),
    "more than half the rows, in a chain": ("mixed_model_equations", [ROW // 3, (ROW + 1) // 2, ROW // 2]),
    "more than half, crossed in blocks": ("blocks", [in_blocks(k) for k in range(4)]),
    "more than half, crossed": ("dense", [ROW // 3, (ROW + 1) // 2, SHUFFLED // 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_and_several_processes_choose_alike(case: str) -> None:
    solver, designs = CASES[case]
    terms: dict[str, Matrix] = {f"t{k}": simple(codes) for k, codes in enumerate(designs)}
    V = Sum(terms | {"residual": ScalarMatrix(N)})
    assert choose_solver(V).solver.name == solver
    if solver == "dense":  # which no processes share
        with pytest.raises(ValueError, match="Give each process all rows"):
            choose_shared(V, "auto", OneOfTwo())
    else:
        assert choose_shared(V, "auto", OneOfTwo()).solver.name == solver
