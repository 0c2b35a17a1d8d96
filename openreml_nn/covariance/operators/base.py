"""Operators: matrices made of matrices. The base class joins the operands' parameters into one flat vector.

A structure that occurs at two places of an expression is one set of parameters: its thetas are listed once, under the
name of the first place, and their gradients add up.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.holder import Holder
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.structures.simple import SimpleMatrix
from openreml_nn.covariance.transform import Transform, TransformIdentity

_POSITIONAL = re.compile(r"\bop_\d+/")


class Operator(Matrix):
    """Base class of operators. A subclass gives ``_shape_of`` and ``build``, and what it can do without ``build``.

    Args:
        operands: Matrices or fixed tensors by position (named ``op_0``, ``op_1``, …), or one dictionary by name.
        named: Operands by keyword.

    Raises:
        TypeError: An operand is neither a `Matrix` nor a tensor.
        ValueError: No operands, a name with a slash, or shapes that do not fit.
    """

    def __init__(self, *operands: Any, **named: Any) -> None:
        given = _named_operands(type(self).__name__, operands, named)
        matrices = list(given.values())
        names, trans, self._index = _layout(given)
        super().__init__(self._shape_of(matrices), names, trans)
        self.operands, self._operand_names = Holder(), list(given)
        for name, matrix in given.items():
            self.operands[name] = matrix
        self._pieces = _pieces(self._index, len(names))
        self._leaves = _leaves_of(given, self._index)

    def _shape_of(self, operands: Sequence[Matrix]) -> tuple[int, int]:
        """Shape of the result; raises ValueError where the operands do not fit together."""
        raise NotImplementedError

    def _register_parameters(self, start: Any) -> None:
        """Nothing: the operands own the parameters."""

    @property
    def operand_names(self) -> list[str]:
        """Names of the operands, in order."""
        return list(self._operand_names)

    def operand(self, name: str) -> Matrix:
        """The operand of this name."""
        return self.operands[name]

    def operand_list(self) -> list[Matrix]:
        """The operands, in order."""
        return list(self.operands)

    def split(self, params: Tensor) -> list[Tensor]:
        """The parameters of each operand, in its own order."""
        if isinstance(self._pieces, tuple):
            return list(params.split_with_sizes(self._pieces))
        return [params[piece] for piece in self._pieces]

    def parts(self, params: Tensor) -> list[tuple[Matrix, Tensor]]:
        """Each operand with its parameters."""
        return list(zip(self.operand_list(), self.split(params), strict=True))

    def operand_index(self, name: str) -> list[int]:
        """Indices in this operator's θ of the parameters of an operand."""
        return list(self._index[self.operand_names.index(name)])

    def theta_parameters(self) -> list[nn.Parameter]:
        own = {i: p for _, leaf, index in self._leaves if index
               for i, p in zip(index, leaf.theta_parameters(), strict=True)}  # fmt: skip
        return [own[i] for i in range(len(own))]

    def leaves(self) -> list[tuple[tuple[str, ...], Matrix, list[int]]]:
        return list(self._leaves)

    @property
    def natural_names(self) -> list[str]:
        return short_names(["/".join((*path, name)) for path, leaf, _ in self.leaves() for name in leaf.natural_names])

    def natural(self, params: Tensor) -> Tensor:
        parts = [leaf.natural(params[index]) for _, leaf, index in self.leaves()]
        return torch.cat(parts) if parts else params

    def from_natural(self, values: Tensor) -> Tensor:
        theta = values.new_zeros(self.num_params)
        leaves = self.leaves()
        pieces = values.split([len(leaf.natural_names) for _, leaf, _ in leaves])
        for (_, leaf, index), own in zip(leaves, pieces, strict=True):
            theta[index] = leaf.from_natural(own)
        return theta

    @property
    def scale_powers(self) -> list[float]:
        """Those of every operand, or all 0 if an operand has no scale: right for operators linear in all operands."""
        if not all(any(operand.scale_powers) for operand in self.operand_list()):
            return [0.0] * self.num_params
        return self._powers_of(range(len(self._index)))

    def _powers_of(self, which: Sequence[int], factor: float = 1.0) -> list[float]:
        powers, operands = [0.0] * self.num_params, self.operand_list()
        for k in which:
            for i, power in zip(self._index[k], operands[k].scale_powers, strict=True):
                powers[i] = factor * power
        return powers

    def _powers_of_first(self) -> list[float]:
        """Those of the first operand with a free parameter that scales it: for products.

        An operand that stands at m places takes the m-th root of the factor; one that shares only some of its
        parameters with another place is passed over.
        """
        operands = self.operand_list()
        for k, operand in enumerate(operands):
            fixed, same = operand.no_grad_index, sum(other is operand for other in operands)
            free = any(power for i, power in enumerate(operand.scale_powers) if i not in fixed)
            others = [index for index, other in zip(self._index, operands, strict=True) if other is not operand]
            if free and set(self._index[k]).isdisjoint(i for index in others for i in index):
                return self._powers_of([k], factor=1.0 / same)
        return [0.0] * self.num_params

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {name: self.operand(name) for name in self.operand_names}


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the positions of operands (``op_1/``), where they stay unique without them."""
    short = [_POSITIONAL.sub("", name) for name in names]
    count = Counter(short)
    return [s if count[s] == 1 else full for s, full in zip(short, names, strict=True)]


def _named_operands(owner: str, operands: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Matrix]:
    if len(operands) == 1 and isinstance(operands[0], Mapping):
        given = dict(operands[0])
    else:
        given = {f"op_{i}": operand for i, operand in enumerate(operands)}
    twice = sorted(given.keys() & named.keys())
    if twice:
        raise ValueError(f"`{owner}` got two operands with the name {twice[0]!r}.")
    given |= named
    if not given:
        raise ValueError(f"`{owner}` needs at least one operand.")
    for name, operand in given.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"`{owner}` needs operand names that are strings without '/', got {name!r}.")
        if isinstance(operand, Tensor):
            given[name] = SimpleMatrix(operand)
        elif not isinstance(operand, Matrix):
            raise TypeError(f"`{owner}` needs `Matrix` or tensor operands, got {type(operand).__name__} for {name!r}.")
    return given


def _layout(given: dict[str, Matrix]) -> tuple[list[str], list[Transform], list[list[int]]]:
    """Names and transforms of the joint θ, and where each operand's parameters are in it."""
    place: dict[int, int] = {}
    names: list[str] = []
    trans: list[Transform] = []
    index: list[list[int]] = []
    for name, matrix in given.items():
        transforms = matrix.param_transforms
        index.append([])
        for i, p in enumerate(matrix.theta_parameters()):
            if id(p) not in place:
                place[id(p)] = len(names)
                names.append(f"{name}/{matrix.param_names[i]}")
                trans.append(transforms[i] or TransformIdentity())
            index[-1].append(place[id(p)])
    return names, trans, index


def _pieces(index: list[list[int]], count: int) -> tuple[int, ...] | list[slice | list[int]]:
    """How to cut θ into the operands' parameters: by sizes where they follow each other, else by indices."""
    if [i for own in index for i in own] == list(range(count)):
        return tuple(len(own) for own in index)
    runs = [slice(own[0], own[0] + len(own)) if own else slice(0) for own in index]
    return [run if own == list(range(count))[run] else own for run, own in zip(runs, index, strict=True)]


def _leaves_of(given: dict[str, Matrix], index: list[list[int]]) -> list[tuple[tuple[str, ...], Matrix, list[int]]]:
    """The structures at the ends of an expression, each once, as `Matrix.leaves` gives them."""
    found: dict[int, tuple[tuple[str, ...], Matrix, list[int]]] = {}
    for (name, matrix), own in zip(given.items(), index, strict=True):
        for path, leaf, places in matrix.leaves():
            found.setdefault(id(leaf), ((name, *path), leaf, [own[i] for i in places]))
    return list(found.values())


def require_square(owner: str, operands: Sequence[Matrix]) -> None:
    """Raise a ValueError unless every operand is square."""
    for operand in operands:
        if operand.shape[0] != operand.shape[1]:
            raise ValueError(f"`{owner}` needs square operands, got one of shape {operand.shape}.")


def require_count(owner: str, operands: Sequence[Matrix], count: int, what: str) -> None:
    """Raise a ValueError unless there are ``count`` operands."""
    if len(operands) != count:
        raise ValueError(f"`{owner}` needs {count} operand{'s' * (count > 1)} ({what}), got {len(operands)}.")
