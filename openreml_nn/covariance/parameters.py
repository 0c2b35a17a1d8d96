"""What a matrix knows of its parameters: names, raw thetas, transforms, which are fixed, and where they start.

A parameter vector is flat and raw: a transform gives the natural value of each theta. Parameters are accepted as such a
vector or as a dictionary by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.holder import Holder
from openreml_nn.covariance.transform import Transform

Params = Tensor | Mapping[str, Tensor]


class Parametrized(nn.Module):
    """Base class of modules with a flat vector of named, transformed parameters.

    Args:
        param_names: Ordered, unique names of the parameters; empty for none.
        trans: One transform for each parameter, or a single one for all, or None for none.
        start: Start values on the natural scale: a number for a single parameter, a sequence for all, or a dictionary
            by name. Raw start values are 0 otherwise.

    Raises:
        TypeError: ``param_names`` is not a list of strings, or ``trans`` holds something that is not a `Transform`.
        ValueError: Names repeat, lengths differ, or a start value is outside its domain.
    """

    _order: Tensor | None
    _back: Tensor | None

    def __init__(
        self, param_names: Sequence[str], trans: Sequence[Transform] | None = None, *, start: Any = None
    ) -> None:
        super().__init__()
        self._param_names = _checked_names(param_names, type(self).__name__)
        self._trans = _checked_transforms(trans, len(self._param_names), type(self).__name__)
        self._groups, order = _groups_of_equal(self._trans)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_back", None if order is None else torch.argsort(order), persistent=False)
        self.raw = Holder()
        self._register_parameters(start)

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
