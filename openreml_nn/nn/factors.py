"""The factors of a head by name, and what a batch says of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.holder import registered_name
from openreml_nn.nn.batch import RESIDUAL, BatchTerm
from openreml_nn.nn.dtypes import KeepsDtype
from openreml_nn.nn.effects import Effects, Entry

Groups = Mapping[str, Entry] | Entry
"""What a batch says of all factors: an entry for each by name, or the entry itself where there is one factor."""


class Factors(KeepsDtype):
    """Random effects by name.

    Args:
        effects: The effects of each factor; at least one.

    Raises:
        TypeError: No dictionary, or no `Effects` in it.
        ValueError: It is empty, or a name is taken or has a "/".
    """

    def __init__(self, effects: Mapping[str, Effects]) -> None:
        super().__init__()
        if not isinstance(effects, Mapping):
            raise TypeError(
                f"`MixedModelHead` needs random effects by name, as {{'subject': Effects(6)}}, got "
                f"{type(effects).__name__}."
            )
        if not effects:
            raise ValueError("`MixedModelHead` needs the random effects of at least one factor.")
        for name, own in effects.items():
            if not isinstance(own, Effects):
                raise TypeError(f"`MixedModelHead` needs `Effects` for {name!r}, got {type(own).__name__}.")
            if not name or name == RESIDUAL or "/" in name:
                raise ValueError(f"`MixedModelHead` needs names without '/', other than 'residual', got {name!r}.")
            self.add_module(registered_name(name), own)
        self.names = list(effects)

    @property
    def effects(self) -> dict[str, Effects]:
        """The effects by name."""
        return {name: self._modules[registered_name(name)] for name in self.names}  # type: ignore[misc]

    def terms(self, groups: Groups, rows: int | None = None, *, unknown: bool = False) -> list[BatchTerm]:
        """The terms of a batch, checked, in the order of the factors.

        Args:
            groups: Codes of shape (m,), or (codes, design), for each factor.
            rows: Number of rows m; that of the first factor's codes when left out.
            unknown: Whether the code −1, a level that is not in the vocabulary, is allowed.

        Raises:
            TypeError: Not tensors.
            ValueError: Other names, or shapes or codes that do not fit.
        """
        if len(self.names) > 1 and not isinstance(groups, Mapping):
            kind = "one tensor" if isinstance(groups, Tensor) else type(groups).__name__
            raise ValueError(f"`MixedModelHead` needs a dictionary with the levels of {self.names}, got {kind}.")
        given = groups if isinstance(groups, Mapping) else dict.fromkeys(self.names, groups)
        if given.keys() != set(self.names):
            raise ValueError(f"`MixedModelHead` needs the levels of {self.names}, got those of {list(given)}.")
        if rows is None:
            first = given[self.names[0]]
            rows = len(first[0] if isinstance(first, (tuple, list)) else first)
        return [
            BatchTerm(own, *own.entry(given[name], rows, name, unknown=unknown)) for name, own in self.effects.items()
        ]

    def thetas_with(self, residual: Matrix) -> list[nn.Parameter]:
        """The raw thetas of all factors and of the residual, each once, in the order of V; no weights of a kernel."""
        matrices = [*(own.G for own in self.effects.values()), residual]
        return list({id(p): p for matrix in matrices for p in matrix.theta_parameters()}.values())

    def average_levels(self) -> list[Tensor]:
        """Covariance of the effects of a level outside the vocabulary of each factor, shape (s, s), in float64."""
        with torch.no_grad():
            return [own.average_level().to(torch.float64) for own in self.effects.values()]
