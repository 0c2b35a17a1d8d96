"""Design of random slopes: covariates of each row at its level."""

from collections.abc import Sequence
from typing import Any

import torch

from openreml_nn.covariance.levels import tensor_of
from openreml_nn.covariance.structures.dummy import DummyMatrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix


class KhatriRaoMatrix(IncidenceMatrix):
    r"""Z of random slopes: row i is x_i ⊗ z_i, x_i its s covariates and z_i its row of a `DummyMatrix`.

    Column a · L + l is effect a of level l, so that the effects have the covariance Σ ⊗ C, Σ of size s and C of size L.

    Args:
        values: Covariates, shape (n, s).
        dummy: The level of each row.
        effects: Names of the s effects; ``x0``, ``x1``, … when left out.

    Raises:
        ValueError: ``values`` has another number of rows, or ``effects`` another number of names.

    Example:
        >>> from openreml_nn.covariance import DummyMatrix, KhatriRaoMatrix
        >>> Z = KhatriRaoMatrix([[1, 5], [1, 6], [1, 7]], DummyMatrix(["a", "b", "a"]), ["intercept", "time"])
        >>> Z().tolist()
        [[1.0, 0.0, 5.0, 0.0], [0.0, 1.0, 0.0, 6.0], [1.0, 0.0, 7.0, 0.0]]
    """

    def __init__(self, values: Any, dummy: DummyMatrix, effects: Sequence[str] | None = None) -> None:
        x = tensor_of(values).detach().to(torch.float64)
        if x.ndim != 2 or len(x) != dummy.shape[0]:
            raise ValueError(f"`KhatriRaoMatrix` needs values of shape ({dummy.shape[0]}, s), got {tuple(x.shape)}.")
        names = [f"x{a}" for a in range(x.shape[1])] if effects is None else list(effects)
        if len(names) != x.shape[1]:
            raise ValueError(f"`KhatriRaoMatrix` needs {x.shape[1]} names of effects, got {len(names)}.")
        super().__init__(dummy.codes.clone(), dummy.labels, x, names)
