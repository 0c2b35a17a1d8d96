"""What a checkpoint of a `REMLModule` holds beside the parameters of V and the state of the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openreml_nn.optim import Progress

_KEY = "openreml_nn"  # of a checkpoint


@dataclass(frozen=True)
class FitRecord:
    """How far a fit has come, and of what it is, in plain values.

    Attributes:
        parameters: Names of the variance parameters; None where the checkpoint is of something else.
        history: Progress after each step.
        seconds: Wall time until then.
        data: Fingerprint of its data; None where it has seen none.
        optimizer: Class of its optimizer; None where it has none.
    """

    parameters: list[str] | None = None
    history: list[Progress] = field(default_factory=list)
    seconds: float = 0.0
    data: dict[str, str] | None = None
    optimizer: str | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "FitRecord":
        """The record in a checkpoint; an empty one where there is none."""
        saved = dict(checkpoint.get(_KEY, {}))
        return cls(**saved | {"history": [Progress(**progress) for progress in saved.get("history", [])]})

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Write the record into a checkpoint."""
        checkpoint[_KEY] = vars(self) | {"history": [vars(progress) for progress in self.history]}

    def require_parameters(self, names: list[str]) -> None:
        """Raise a ValueError where the fit is of a V with other parameters."""
        if self.parameters not in (None, names):
            raise ValueError(
                f"The checkpoint is of another model: it has the parameters {self.parameters}, this one {names}."
            )

    def require_optimizer(self, name: str) -> None:
        """Raise a ValueError where the fit is by another optimizer, whose state is not in the checkpoint."""
        if self.optimizer not in (None, name):
            raise ValueError(
                f"The checkpoint is of a fit by {self.optimizer}, this one is by {name}. Go on with the same "
                f"optimizer, or start a new fit without the checkpoint."
            )
