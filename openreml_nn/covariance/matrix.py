"""The contract of a covariance matrix: V = V(θ), a module whose parameters are its raw thetas.

A subclass names its parameters and their transforms and gives the formula in ``build``. Everything else (validation,
dictionaries, transforms, Jacobians, fixed parameters, start values, copies) is here, once. A structure that multiplies
or adds itself faster than through its dense form overrides ``matmul``, ``add_to``, ``submatrix``, ``entries`` or
``diagonal``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.holder import Holder
from openreml_nn.covariance.transform import Transform

Params = Tensor | Mapping[str, Tensor]


class Matrix(nn.Module, ABC):
    r"""Base class of matrices V(θ) with named, transformed parameters.

    The parameter vector is flat and raw: ``build`` applies the transforms itself, :math:`V = V(f_0(\theta_0), …)`.

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
    _order: Tensor | None
    _back: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        param_names: Sequence[str],
        trans: Sequence[Transform] | None = None,
        no_grad_index: Sequence[int] | None = None,
        *,
        start: Any = None,
    ) -> None:
        super().__init__()
        self._shape = (int(shape[0]), int(shape[1]))
        self._param_names = _checked_names(param_names, type(self).__name__)
        self._trans = _checked_transforms(trans, len(self._param_names), type(self).__name__)
        self._groups, order = _groups_of_equal(self._trans)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_back", None if order is None else torch.argsort(order), persistent=False)
        self._grad_mode = "default"
        self.raw = Holder()
        self._register_parameters(start)
        self.reset_intermediates()
        if no_grad_index:
            self.set_no_grad(index=list(no_grad_index))

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
        """Elements of Z C Z', as ``entries`` gives them."""
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

    # ---- thetas ------------------------------------------------------------------------------------------------------

    @property
    def theta(self) -> Tensor:
        """The module's own raw thetas as one flat tensor, differentiable."""
        own: list[Tensor] = [*self.theta_parameters()]
        return torch.cat(own) if own else torch.zeros(0, dtype=torch.float64, device=self._device())

    def theta_parameters(self) -> list[nn.Parameter]:
        """The ``nn.Parameter`` of each theta, in the order of ``param_names``."""
        return list(self.raw)

    def set_theta(self, values: Params) -> None:
        """Write raw thetas (a flat tensor or a dictionary by name) into the module."""
        flat = self._flat(values).detach()
        with torch.no_grad():
            for p, value in zip(self.theta_parameters(), flat, strict=True):
                p.copy_(value.reshape(1))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self._shape

    @property
    def param_names(self) -> list[str]:
        """Ordered names of the parameters."""
        return list(self._param_names)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return len(self._param_names)

    @property
    def trans(self) -> list[Transform] | None:
        """The transforms as they were given: one for each parameter, a single one for all, or None."""
        return None if self._trans is None else list(self._trans)

    # ---- fixed parameters --------------------------------------------------------------------------------------------

    @property
    def no_grad_index(self) -> list[int]:
        """Indices of the fixed parameters, read from their ``requires_grad``."""
        return [i for i, p in enumerate(self.theta_parameters()) if not p.requires_grad]

    @property
    def free_index(self) -> list[int]:
        """Indices of the parameters that are not fixed."""
        return [i for i, p in enumerate(self.theta_parameters()) if p.requires_grad]

    def free_columns(self, J: Tensor) -> Tensor:
        """The columns of the free parameters of J, shape (m, k); J itself where none is fixed, without an index."""
        free = self.free_index
        return J if len(free) == self.num_params else J[:, free]

    def set_no_grad(
        self, index: int | Sequence[int] | None = None, param_name: str | Sequence[str] | None = None
    ) -> None:
        """Fix exactly these parameters and free all others; ``set_no_grad([])`` frees all.

        Args:
            index: Index or indices into ``param_names``.
            param_name: Name or names, instead of ``index``.

        Raises:
            ValueError: Both or neither are given, or an index is out of range. Nothing is changed then.
            KeyError: A name is not in ``param_names``. Nothing is changed then.
        """
        if (index is None) == (param_name is None):
            raise ValueError("`set_no_grad` needs exactly one of `index` and `param_name`.")
        if param_name is not None:
            names = [param_name] if isinstance(param_name, str) else list(param_name)
            for name in names:
                if name not in self._param_names:
                    raise KeyError(f"`set_no_grad` got the name {name!r}; the parameters are {self._param_names}.")
            fixed = {self._param_names.index(name) for name in names}
        else:
            fixed = _checked_index(index, self.num_params)
        for i, p in enumerate(self.theta_parameters()):
            p.requires_grad_(i not in fixed)
            if i in fixed:
                p.grad = None

    # ---- parameters as tensor and as dictionary ----------------------------------------------------------------------

    def check_params(self, params: Params) -> tuple[torch.device, torch.dtype]:
        """Validate raw parameters and return their (device, dtype).

        Raises:
            TypeError: Not a tensor (or dictionary of tensors) of a floating-point type.
            ValueError: Not 1-D, or of the wrong length.
        """
        flat = self.from_param_dict(params)
        if not isinstance(flat, Tensor):
            raise TypeError(f"`{self._name}` needs a tensor or a dictionary of parameters, got {type(flat).__name__}.")
        if not flat.is_floating_point():
            raise TypeError(f"`{self._name}` needs floating-point parameters, got {flat.dtype}.")
        if flat.ndim != 1 or len(flat) != self.num_params:
            raise ValueError(
                f"`{self._name}` needs a flat tensor of {self.num_params} parameters "
                f"({', '.join(self._param_names) or 'none'}), got shape {tuple(flat.shape)}."
            )
        return flat.device, flat.dtype

    def from_param_dict(self, param_dict: Params) -> Tensor:
        """The flat tensor of a dictionary of parameters, in the order of ``param_names``; a tensor stays as it is.

        Raises:
            ValueError: Keys are missing or unexpected, or a value does not have one element.
        """
        if isinstance(param_dict, Tensor) or not isinstance(param_dict, Mapping):
            if isinstance(param_dict, Tensor) and param_dict.ndim == 1 and len(param_dict) != len(self._param_names):
                raise ValueError(f"`{self._name}` needs {self.num_params} parameters, got {len(param_dict)}.")
            return param_dict
        missing = [name for name in self._param_names if name not in param_dict]
        unexpected = [name for name in param_dict if name not in self._param_names]
        if missing or unexpected:
            raise ValueError(
                f"`{self._name}` needs the parameters {self._param_names}; missing {missing}, unexpected {unexpected}."
            )
        if not self._param_names:
            return self.theta
        values = [_tensor(param_dict[name]).reshape(-1) for name in self._param_names]
        for name, value in zip(self._param_names, values, strict=True):
            if len(value) != 1:
                raise ValueError(f"`{self._name}` needs one value for {name!r}, got {len(value)}.")
        return torch.cat(values)

    def to_param_dict(self, params: Params) -> dict[str, Tensor]:
        """Dictionary from each name to a tensor of one element; a dictionary is returned as it is."""
        if isinstance(params, Mapping):
            return dict(params)
        self.check_params(params)
        return dict(zip(self._param_names, params.split(1), strict=True)) if self.num_params else {}

    # ---- transforms --------------------------------------------------------------------------------------------------

    def trans_params(self, params: Params) -> Tensor:
        """The natural parameters f_k(θ_k), same shape as ``params``."""
        return self._elementwise(params, lambda t, x: t.forward(x), lambda x: x)

    def trans_grad(self, params: Params) -> Tensor:
        """The derivatives f_k'(θ_k), same shape as ``params``; ones without transforms."""
        return self._elementwise(params, lambda t, x: t.grad(x), torch.ones_like)

    def _elementwise(
        self, params: Params, apply: Callable[[Transform, Tensor], Tensor], without: Callable[[Tensor], Tensor]
    ) -> Tensor:
        flat = self.from_param_dict(params)
        if not self._groups:
            return without(flat)
        if len(self._groups) == 1:
            return apply(self._groups[0][0], flat)
        grouped = flat if self._order is None else flat[self._order]
        pieces = grouped.split([count for _, count in self._groups])
        parts = torch.cat([apply(t, piece) for (t, _), piece in zip(self._groups, pieces, strict=True)])
        return parts if self._back is None else parts[self._back]

    @property
    def param_transforms(self) -> list[Transform | None]:
        """The transform of each parameter, in the order of ``param_names``; None for one without."""
        if not self._trans:
            return [None] * self.num_params
        return [*self._trans] * self.num_params if len(self._trans) == 1 else [*self._trans]

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

    # ---- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _device(self) -> torch.device:
        held: Tensor | None = next(self.parameters(), None)
        held = next(self.buffers(), None) if held is None else held
        return torch.device("cpu") if held is None else held.device

    def _flat(self, params: Params | None) -> Tensor:
        if params is None:
            return self.theta
        self.check_params(params)
        return self.from_param_dict(params)

    def _register_parameters(self, start: Any) -> None:
        for name, value in zip(self._param_names, self._start_theta(start), strict=True):
            self.raw[name] = nn.Parameter(value.reshape(1))

    def _start_theta(self, start: Any) -> Tensor:
        """Raw thetas of natural start values; 0 where none is given."""
        theta = torch.zeros(self.num_params, dtype=torch.float64)
        if start is None:
            return theta
        if not isinstance(start, Mapping):
            values = torch.as_tensor(start, dtype=torch.float64).reshape(-1).tolist()
            if len(values) != self.num_params:
                raise ValueError(f"`{self._name}` needs {self.num_params} start values, got {len(values)}.")
            start = dict(zip(self._param_names, values, strict=True))
        transforms = self.param_transforms
        for name, value in start.items():
            if name not in self._param_names:
                raise ValueError(f"`{self._name}` got a start for {name!r}; its parameters are {self._param_names}.")
            i, natural = self._param_names.index(name), torch.as_tensor(value, dtype=torch.float64).reshape(())
            t = transforms[i]
            theta[i] = natural if t is None else t.inverse(natural)
            if not math.isfinite(theta[i]):
                raise ValueError(f"`{self._name}` needs a finite start for {name!r}, got {float(natural)}.")
        return theta


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _checked_names(names: Sequence[str], owner: str) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`{owner}` needs `param_names` as a list of strings, got {names!r}.")
    if len(set(names)) != len(names):
        raise ValueError(f"`{owner}` needs unique parameter names, got {list(names)}.")
    if "" in names:
        raise ValueError(f"`{owner}` got an empty parameter name.")
    return list(names)


def _checked_transforms(trans: Sequence[Transform] | None, count: int, owner: str) -> list[Transform] | None:
    if trans is None or len(trans) == 0:
        return None
    for t in trans:
        if not isinstance(t, Transform):
            raise TypeError(f"`{owner}` needs `trans` as a list of `Transform`s, got an element of {type(t).__name__}.")
    if len(trans) not in (1, count):
        raise ValueError(f"`{owner}` needs 1 or {count} transforms, got {len(trans)}.")
    return list(trans)


def _checked_index(index: Any, count: int) -> set[int]:
    given = [index] if isinstance(index, int) else list(index)
    for i in given:
        if not isinstance(i, int) or not 0 <= i < count:
            raise ValueError(f"`set_no_grad` needs indices from 0 to {count - 1}, got {i!r}.")
    return set(given)


def _groups_of_equal(trans: list[Transform] | None) -> tuple[list[tuple[Transform, int]], Tensor | None]:
    """The different transforms with the number of parameters of each, so that each is applied once, and their order.

    The order is the parameters of the first transform, then those of the next; None where they stand so.
    """
    different: list[tuple[Transform, list[int]]] = []
    for i, t in enumerate(trans or []):
        own = next((own for other, own in different if other == t), None)
        if own is None:
            different.append((t, [i]))
        else:
            own.append(i)
    order = [i for _, own in different for i in own]
    return [(t, len(own)) for t, own in different], None if order == sorted(order) else torch.tensor(order)
