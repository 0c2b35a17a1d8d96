"""The contract of a covariance matrix: V = V(θ), a module whose parameters are its raw thetas.

A subclass names its parameters and their transforms and gives the formula in ``build``. Everything else is written
once: what concerns the parameters alone in `Parametrized`, and Jacobians, reports and copies here. A structure that
multiplies or adds itself faster than through its dense form overrides ``matmul``, ``add_to``, ``submatrix``,
``entries`` or ``diagonal``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.parameters import Parametrized, Params
from openreml_nn.covariance.transform import Transform


class Matrix(Parametrized, ABC):
    r"""Base class of matrices V(θ) with named, transformed parameters.

    The parameter vector is flat and raw: ``build`` applies the transforms itself, :math:`V = V(f_0(\theta_0), …)`.
    A positive parameter counts as a variance, by which the matrix is multiplied; where one is a length or a standard
    deviation, override ``scale_powers``: ``[1.0, 0.0]`` for a variance and a length.

    Args:
        shape: Shape of the matrix, (rows, columns).
        param_names: Ordered, unique names of the parameters; empty for a fixed matrix.
        trans: One transform for each parameter, or a single one for all, or None for none.
        no_grad_index: Indices of parameters that are fixed.
        start: Start values on the natural scale: a number for a single parameter, a sequence for all, or a dictionary
            by name. Raw start values are 0 otherwise.

    Raises:
        TypeError: ``param_names`` is not a list of strings, or ``trans`` holds something that is not a `Transform`.
        ValueError: Names repeat, an index is out of range, lengths differ, or a start value is outside its domain.
    """

    _intermediates: tuple[Tensor, Any] | None

    def __init__(
        self,
        shape: tuple[int, int],
        param_names: Sequence[str],
        trans: Sequence[Transform] | None = None,
        no_grad_index: Sequence[int] | None = None,
        *,
        start: Any = None,
    ) -> None:
        super().__init__(param_names, trans, start=start)
        self._shape = (int(shape[0]), int(shape[1]))
        self._grad_mode = "default"
        self.reset_intermediates()
        if no_grad_index:
            self.set_no_grad(index=list(no_grad_index))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self._shape

    # ---- the formula -------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, params: Tensor) -> Tensor:
        """The dense matrix of shape ``shape`` from the flat raw parameters, in their dtype and on their device."""

    def forward(self, params: Params | None = None) -> Tensor:
        """The dense matrix at ``params`` (tensor or dictionary of raw thetas), or at the module's own thetas."""
        return self.build(self._flat(params))

    # ---- what a structure may do faster than through its dense form --------------------------------------------------

    def matmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        """V(θ) @ ``rhs`` for ``rhs`` of shape (columns, m)."""
        return self.build(params) @ rhs

    def rmatmul(self, params: Tensor, rhs: Tensor) -> Tensor:
        """V(θ)' @ ``rhs`` for ``rhs`` of shape (rows, m)."""
        return self.build(params).mT @ rhs

    def add_to(self, out: Tensor, params: Tensor) -> Tensor:
        """Add V(θ) to ``out`` in place, tracked by autograd (not under ``torch.func``); returns ``out``."""
        return out.add_(self.build(params))

    def submatrix(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The given rows and columns of V(θ), shape (len(rows), len(columns)); an index may repeat."""
        return self.build(params)[rows][:, columns]

    def entries(self, params: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Elements (row, column) of V(θ), one for each pair of two index tensors that broadcast, in their shape."""
        return self.build(params)[rows, columns]

    def diagonal(self, params: Tensor) -> Tensor:
        """The main diagonal of V(θ)."""
        return self.build(params).diagonal()

    def mean_diagonal(self, params: Tensor) -> Tensor:
        """The mean of the main diagonal: the average variance."""
        return self.diagonal(params).mean()

    @property
    def is_diagonal(self) -> bool:
        """Whether V(θ) is diagonal at every θ, so that ``diagonal`` says it all."""
        return False

    def level_blocks(self, params: Tensor, count: int) -> Tensor | None:
        """The ``count`` blocks of a G whose effects are correlated only within a level, or None where G is not so.

        Element (a · count + l, b · count + l) of G, effects a and b of level l, is element (l, a, b) of the result.
        """
        if not self.is_diagonal or self.shape[0] % count:
            return None
        return torch.diag_embed(self.diagonal(params).reshape(-1, count).mT)

    def common_block(self, params: Tensor, count: int) -> Tensor | None:
        """The block that all levels share, shape (s, s), where ``level_blocks`` are all equal; else None."""
        return None

    def sandwich(self, params: Tensor, inner: "Matrix", inner_params: Tensor) -> Tensor:
        """Z C Z' for this matrix as Z and a square matrix ``inner`` as C."""
        Z = self.build(params)
        return Z @ inner.matmul(inner_params, Z.mT)

    def sandwich_diagonal(self, params: Tensor, inner: "Matrix", inner_params: Tensor) -> Tensor:
        """The diagonal of Z C Z', shape (rows,)."""
        parts = self.build(params).split(4096)  # so that nothing else of the size of a large Z is formed
        return torch.cat([(inner.matmul(inner_params, Z.mT).mT * Z).sum(1) for Z in parts])

    def sandwich_mean_diagonal(self, params: Tensor, inner: "Matrix", inner_params: Tensor) -> Tensor:
        """The mean of the diagonal of Z C Z'."""
        return self.sandwich_diagonal(params, inner, inner_params).mean()

    def sandwich_entries(
        self, params: Tensor, inner: "Matrix", inner_params: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Elements of Z C Z', as ``entries`` gives them.

        Args:
            params: Raw thetas of Z.
            inner: C, square.
            inner_params: Raw thetas of C.
            rows: Row of each element, an index tensor.
            columns: Column of each element; it broadcasts with ``rows``.
        """
        return self.sandwich(params, inner, inner_params)[rows, columns]

    def add_sandwich_to(self, out: Tensor, params: Tensor, inner: "Matrix", inner_params: Tensor) -> Tensor:
        """Add Z C Z' to ``out`` in place, as ``add_to`` does."""
        return out.add_(self.sandwich(params, inner, inner_params))

    # ---- what a report shows -----------------------------------------------------------------------------------------

    @property
    def natural_names(self) -> list[str]:
        """Names of the parameters that a report shows; those of ``natural``."""
        return self.param_names

    def leaves(self) -> list[tuple[tuple[str, ...], "Matrix", list[int]]]:
        """The structures that own the parameters: (names of operands that lead to it, structure, its indices in θ)."""
        return [((), self, list(range(self.num_params)))]

    def natural(self, params: Tensor) -> Tensor:
        """Parameters on the scale of a report (variances, covariances, correlations), shape (len(natural_names),)."""
        return self.trans_params(params)

    def from_natural(self, values: Tensor) -> Tensor:
        """Raw thetas at which ``natural`` gives these values: the way to set parameters on the scale of a report.

        Args:
            values: Natural values in the order of ``natural_names``, shape (len(natural_names),).

        Raises:
            ValueError: A value is outside its domain.
        """
        inverses = (x if t is None else t.inverse(x) for t, x in zip(self.param_transforms, values, strict=True))
        return torch.stack(list(inverses)) if self.num_params else values

    @property
    def scale_powers(self) -> list[float]:
        """Power p of each transformed parameter: all of them times cᵖ is the matrix times c.

        1 for a variance, ½ for a standard deviation or a loading, 0 for a correlation or a range; all 0 where the
        matrix has no scale. By default a parameter whose transform has the image (0, ∞) counts as a variance and every
        other one as free of scale.
        """
        return [1.0 if t is not None and t.image == (0.0, math.inf) else 0.0 for t in self.param_transforms]

    @property
    def mirrors(self) -> dict[int, list[int]]:
        """For a parameter that may cross zero only in another's stead: the raw parameters that then change sign.

        The diagonal of a triangular factor is positive, and the factor with a column times −1 is the same matrix; so
        the entries below a diagonal entry are its mirrors. Empty by default.
        """
        return {}

    def rescale(self, params: Tensor, factor: float) -> Tensor:
        """Raw thetas at which the matrix is ``factor`` times the one at ``params``; ``params`` if it has no scale."""
        out = params.detach().clone()
        for i, (t, power) in enumerate(zip(self.param_transforms, self.scale_powers, strict=True)):
            if power:
                x = params[i].detach()
                out[i] = x * factor**power if t is None else t.inverse(t.forward(x) * factor**power)
        return out

    # ---- Jacobians ---------------------------------------------------------------------------------------------------

    @property
    def grad_mode(self) -> str:
        """``"default"``: ``manual_grad`` where there is one; ``"auto"``: always automatic differentiation."""
        return self._grad_mode

    @grad_mode.setter
    def grad_mode(self, mode: str) -> None:
        self._grad_mode = mode

    def grad(self, params: Params) -> tuple[Tensor | None, list[str]]:
        """Jacobian of the matrix with respect to the free raw parameters.

        Returns:
            (J, names): J of shape (k, rows, columns) for the k free parameters and their names, or (None, []).

        Raises:
            RuntimeError: ``grad_mode`` is neither ``"default"`` nor ``"auto"``.
        """
        if self.grad_mode not in ("default", "auto"):
            raise RuntimeError(f"`grad_mode` must be 'default' or 'auto', got {self.grad_mode!r}.")
        if self.grad_mode == "default":
            try:
                return self.manual_grad(params)
            except NotImplementedError:
                pass
        return self.auto_grad(params)

    def auto_grad(self, params: Params) -> tuple[Tensor | None, list[str]]:
        """``grad`` by automatic differentiation of ``build``: one forward-mode pass for each parameter."""
        free = self.free_index
        if not free:
            return None, []
        self.reset_intermediates()
        flat = self._flat(params)
        directions = self.free_columns(torch.eye(self.num_params, dtype=flat.dtype, device=flat.device)).mT
        columns = torch.func.vmap(lambda d: torch.func.jvp(self.build, (flat,), (d,))[1])(directions)
        return columns, [self._param_names[i] for i in free]

    def manual_grad(self, params: Params) -> tuple[Tensor | None, list[str]]:
        """``grad`` by a closed form, where a subclass gives one; with respect to raw thetas, fixed ones left out."""
        raise NotImplementedError(f"`{self._name}` has no closed form of its gradient; `grad` differentiates `build`.")

    def map_theta_to_v(self, theta: Params) -> Tensor:
        """The matrix at ``theta``: ``self(theta)`` under the name that torch-openreml's ``REML`` calls."""
        return self(theta)

    def map_theta_to_dv(self, theta: Params) -> Tensor | None:
        """The Jacobian at ``theta``: ``self.grad(theta)[0]`` under the name that torch-openreml's ``REML`` calls."""
        return self.grad(theta)[0]

    # ---- cache for users ---------------------------------------------------------------------------------------------

    def set_intermediates(self, params: Params, intermediates: Any) -> None:
        """Keep an object for these parameters; a no-op for a matrix without parameters."""
        flat = self._flat(params)
        if len(flat):
            self._intermediates = (flat.detach().clone(), intermediates)

    def get_intermediates(self, params: Params) -> Any:
        """The object kept for parameters of the same values, dtype and device, or None."""
        flat = self._flat(params)
        if self._intermediates is None or not len(flat):
            return None
        kept, intermediates = self._intermediates
        same = kept.dtype == flat.dtype and kept.device == flat.device and torch.equal(kept, flat.detach())
        return intermediates if same else None

    def reset_intermediates(self) -> None:
        """Forget what ``set_intermediates`` kept."""
        self._intermediates = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_intermediates": None}

    # ---- text --------------------------------------------------------------------------------------------------------

    @property
    def repr_dict(self) -> dict[str, Any]:
        """What the text form shows: shape, parameters, and the fixed ones where there are any."""
        fixed = [self._param_names[i] for i in self.no_grad_index]
        return {"shape": self.shape, "params": self.param_names} | ({"fixed": fixed} if fixed else {})

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{key}={value}' for key, value in self.repr_dict.items())})"
