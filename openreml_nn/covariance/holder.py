"""Where a matrix keeps its parameters and an operator its operands: apart from its attributes, under any name.

A parameter may be called ``grad`` and an operand ``shape``, which are attributes of `Matrix`, and either may have a
point in its name, which ``nn.Module`` refuses.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

_RESERVED = frozenset(dir(nn.Module())) | {"training"}


def registered_name(name: str) -> str:
    """The name under which `Holder` registers a name: readable, one-to-one, acceptable to ``nn.Module``."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return key + "_" if key in _RESERVED or key.endswith("_") else key


class Holder(nn.Module):
    """Parameters or modules by name, in the order in which they were set; one that has two names is there twice.

    Example:
        >>> from torch import nn
        >>> from openreml_nn.covariance.holder import Holder
        >>> holder = Holder()
        >>> holder["to"] = nn.Linear(2, 1)
        >>> list(holder.state_dict())
        ['to_.weight', 'to_.bias']
    """

    def __setitem__(self, name: str, held: nn.Parameter | nn.Module) -> None:
        if isinstance(held, nn.Module):
            self.add_module(registered_name(name), held)
        else:
            self.register_parameter(registered_name(name), held)

    def __getitem__(self, name: str) -> Any:
        key = registered_name(name)
        return self._modules[key] if key in self._modules else self._parameters[key]

    def __iter__(self) -> Iterator[Any]:
        return iter((*self._parameters.values(), *self._modules.values()))
