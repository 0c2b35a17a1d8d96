"""A covariance whose entries come from a network: a kernel on learned features."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.levels import values_of
from openreml_nn.covariance.matrix import Matrix, Params
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2

ELEMENTS_AT_ONCE = 2**22  # of a kernel that is made for a product only, 32 MiB
POINTS_FOR_UNIT = 1000  # of which the distances are looked at


def _matern32(r: Tensor) -> Tensor:
    return (1.0 + math.sqrt(3.0) * r) * torch.exp(-math.sqrt(3.0) * r)


def _matern52(r: Tensor) -> Tensor:
    return (1.0 + math.sqrt(5.0) * r + 5.0 / 3.0 * r.square()) * torch.exp(-math.sqrt(5.0) * r)


CORRELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": lambda r: torch.exp(-r),
    "gaussian": lambda r: torch.exp(-r.square()),
    "matern32": _matern32,
    "matern52": _matern52,
}
"""Correlations c(r) of the relative distance r by name."""


class NeuralMatrix(Matrix):
    r"""V_ij = k(φ(x_i), φ(x_j)), φ a network: a deep kernel, positive semi-definite whatever the weights are.

    The kernel on the features is ``"linear"``, σ² φ(x_i)'φ(x_j), of the rank m of the features, or for a correlation c

    .. math:: k(φ, φ') = σ² c(r), \quad r = |φ − φ'| / (u · range),

    where the unit u, a buffer, is half the median distance between the features when the matrix was made.

    The thetas are those of the kernel, σ² and the range. The weights are no thetas but ordinary parameters of the
    submodule ``network``: they are many, and the data cannot tell some of them apart (hidden units may be permuted, and
    the scale of the last layer stands against the range), so that an information matrix of them would be singular.
    Gradients of the likelihood reach them through the dense solver, and as G of a term Z G Z' through the mixed-model
    equations; Adam takes them together with the thetas, or before `fit` takes the thetas with the weights as they are.

    The features are computed anew at each use, so that they follow the weights. Where the weights are final, linear
    features Φ are a fixed design: ``CovariancePropagation(SimpleMatrix(Φ), ScalarMatrix(m))`` is the same matrix, and
    the solvers then work with m columns instead of n rows. They compute their cross-products once, so that this is no
    way to train the weights.

    Args:
        x: Inputs: a tensor of shape (n, …) as the network takes it, or `Levels` or array-like numbers, which become
            float64 of shape (n, d). Floating inputs are cast to the dtype of the weights.
        network: φ, from inputs to features of shape (n, m). It must be a function of the inputs alone, so that V is
            one matrix: without dropout or statistics of the batch.
        kernel: ``"linear"``, ``"gaussian"`` (exp(−r²)), ``"exponential"``, ``"matern32"``, ``"matern52"``, or a
            correlation c as a function of r, elementwise, with c(0) = 1 and positive definite in m dimensions.
        start: Start values of σ² and the range, the latter in units of u.

    Raises:
        TypeError: ``network`` is not a module.
        ValueError: An unknown kernel, features of another shape, features that differ between two calls, or that are
            equal for all inputs.

    Source: Wilson, Hu, Salakhutdinov & Xing (2016), Deep kernel learning, AISTATS.

    Example:
        >>> import torch
        >>> from openreml_nn.covariance import NeuralMatrix
        >>> K = NeuralMatrix([[0.0], [1.0], [3.0]], torch.nn.Identity(), "linear", start=2.0)
        >>> K().tolist()
        [[0.0, 0.0, 0.0], [0.0, 2.0, 6.0], [0.0, 6.0, 18.0]]
        >>> K.cross([[2.0]]).tolist()
        [[0.0, 4.0, 12.0]]
    """

    x: Tensor
    unit: Tensor | None

    def __init__(
        self, x: Any, network: nn.Module, kernel: str | Callable[[Tensor], Tensor] = "linear", *, start: Any = None
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"`NeuralMatrix` needs a network as a `torch.nn.Module`, got {type(network).__name__}.")
        _check_kernel(kernel)
        x, stationary = _inputs(x), kernel != "linear"
        names = ["sigma^2", "range"] if stationary else ["sigma^2"]
        super().__init__((len(x), len(x)), names, [TransformExpPow2(), TransformExp()][: len(names)], start=start)
        self.network, self.kernel = network, kernel
        self.register_buffer("x", x, persistent=False)
        features = self._checked_features()
        self.register_buffer("unit", _unit(features) if stationary else None)

    # ---- features ----------------------------------------------------------------------------------------------------

    def features(self, x: Any = None) -> Tensor:
        """φ(x), shape (n, m), in the dtype of the network; at the matrix's own inputs when ``x`` is left out."""
        x = self.x if x is None else _inputs(x)
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if weight is not None:
            x = x.to(weight) if x.is_floating_point() else x.to(weight.device)
        features = self.network(x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
            came = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"`NeuralMatrix` needs features of shape ({len(x)}, m) from its network, got {came}.")
        return features

    def _checked_features(self) -> Tensor:
        """The features; an error where they are not the same in training and evaluation, and at each call."""
        modes, seen = [(module, module.training) for module in self.network.modules()], []
        try:
            for training in (True, True, False):
                self.network.train(training)
                with torch.no_grad():
                    seen.append(self.features())
        finally:
            for module, mode in modes:
                module.training = mode
        if not all(torch.allclose(seen[0], other) for other in seen[1:]):
            raise ValueError(
                "`NeuralMatrix` needs a network that is a function of its inputs, and this one gives other features at "
                "another call or in another mode. Leave out dropout and batch normalisation; layer normalisation is "
                "possible."
            )
        if not bool(torch.isfinite(seen[0]).all()):
            raise ValueError("`NeuralMatrix` got features that are not finite. Check the inputs, and scale them.")
        return seen[0]

    # ---- the kernel --------------------------------------------------------------------------------------------------

    def _between(self, params: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """k of each row of ``left`` with each of ``right``."""
        if self.unit is None:
            return (self.trans_params(params) * left) @ right.mT
        return self._of_distance(params, torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist"))

    def _of_distance(self, params: Tensor, distances: Tensor) -> Tensor:
        assert self.unit is not None
        sigma2, reach = self.trans_params(params)
        correlation = CORRELATIONS[self.kernel] if isinstance(self.kernel, str) else self.kernel
        return sigma2 * correlation(distances / (reach * self.unit.to(params.dtype)))

    def _own(self, params: Tensor) -> Tensor:
        return self.features().to(params.dtype)

    def cross(self, x: Any, other: Any = None, params: Params | None = None) -> Tensor:
        """Covariances of new points with the matrix's own, shape (m, n), or with others, for predictions.

        Args:
            x: Inputs of m points, as those of the matrix.
            other: Inputs of the other points; the matrix's own when left out.
            params: Raw thetas; the module's own when left out.
        """
        theta = self._flat(params)
        left = self.features(x).to(theta.dtype)
        return self._between(theta, left, self.features(other).to(theta.dtype))

    def build(self, params: Tensor) -> Tensor:
        features = self._own(params)
        return self._between(params, features, features)

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        """Through the features, or by rows of V that fit, so that V is not formed; autograd keeps what it needs."""
        features = self._own(params)
        if self.unit is None:
            return self.trans_params(params) * (features @ (features.mT @ rhs))
        parts = features.split(max(1, ELEMENTS_AT_ONCE // len(features)))
        return torch.cat([self._between(params, part, features) @ rhs for part in parts])

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        return self.matmul(params, rhs)

    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        if self.unit is not None:
            return super().add_to(out, params)
        features = self._own(params)
        return out.addmm_(self.trans_params(params) * features, features.mT)

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if len(rows) * len(columns) > self.shape[0] ** 2:  # points repeat
            return self.build(params)[rows][:, columns]
        features = self._own(params)
        return self._between(params, features[rows], features[columns])

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if math.prod(torch.broadcast_shapes(rows.shape, columns.shape)) > self.shape[0] ** 2:
            return self.build(params)[rows, columns]
        features = self._own(params)
        left, right = features[rows], features[columns]
        if self.unit is None:
            return self.trans_params(params) * (left * right).sum(-1)
        return self._of_distance(params, torch.linalg.vector_norm(left - right, dim=-1))

    def diagonal(self, params: Tensor) -> Tensor:
        if self.unit is None:
            return self.trans_params(params) * self._own(params).square().sum(1)
        return self.trans_params(params)[:1].expand(self.shape[0])

    @property
    def scale_powers(self) -> list[float]:
        return [1.0, 0.0][: self.num_params]


def _inputs(x: Any) -> Tensor:
    """A tensor as it is, and anything else as float64 of shape (n, d)."""
    x = x.detach() if isinstance(x, Tensor) else values_of(x, "NeuralMatrix")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"`NeuralMatrix` needs inputs of shape (n, …), got {tuple(x.shape)}.")
    return x


def _check_kernel(kernel: Any) -> None:
    if isinstance(kernel, str):
        if kernel != "linear" and kernel not in CORRELATIONS:
            names = ", ".join(map(repr, CORRELATIONS))
            raise ValueError(f"`NeuralMatrix` has no kernel {kernel!r}; there are 'linear', {names}, or a function.")
    elif not callable(kernel):
        raise TypeError(f"`NeuralMatrix` needs a kernel by name or as a function, got {type(kernel).__name__}.")
    else:
        with torch.no_grad():
            at_zero = kernel(torch.zeros(1, dtype=torch.float64))
        if not bool(torch.isclose(at_zero, torch.ones_like(at_zero)).all()):
            raise ValueError(f"`NeuralMatrix` needs a correlation with c(0) = 1, got {float(at_zero):.6g}.")


def _unit(features: Tensor) -> Tensor:
    """Half the median distance between points with different features, in float64."""
    some = features[:: -(-len(features) // POINTS_FOR_UNIT)].to(torch.float64)
    d = torch.pdist(some)
    if not bool((d > 0).any()):
        raise ValueError("`NeuralMatrix` needs at least two points with different features.")
    return 0.5 * d[d > 0].median()
