"""The random effects of one factor for use in networks: its levels, the effects of a level, their covariance.

In batches a level is a code, as for an embedding. `Effects` is the vocabulary that gives the codes and the owner of the
thetas of G; which rows a batch has is never kept here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import (
    IdentityMatrix,
    IncidenceMatrix,
    KroneckerProduct,
    Levels,
    Matrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.nn.dtypes import KeepsDtype
from openreml_nn.nn.fixed_values import differing, fixed_values
from openreml_nn.nn.vocabulary import difference, level_numbers, texts

Entry = Tensor | tuple[Tensor, Tensor]
"""What a batch says of one factor: codes of shape (m,), or (codes, design) with a design of shape (m, s)."""

INTERCEPT = "intercept"


class Effects(KeepsDtype):
    r"""Random effects b ~ N(0, G(θ)) of the levels of one factor, s effects for each of q levels.

    ==================== ===============================================================================================
    random effects       how
    ==================== ===============================================================================================
    intercepts           ``Effects(50)``; batches bring codes
    slopes               ``Effects(50, ["intercept", "time"])``; batches bring (codes, design), columns 1 and time
    a kernel over levels ``Effects(lines, covariance=KnownMatrix(K))``
    coordinates          ``Effects(sites, covariance=ExponentialMatrix(xy))``
    features of levels   ``Effects(sites, covariance=NeuralMatrix(features, network, "matern32"))``
    slopes over a kernel ``Effects(lines, ["intercept", "time"], KroneckerProduct(UnstructuredMatrix(2), K))``
    nested, crossed      one `Effects` for each factor; levels of a nested one by joint labels, ``"school1:class2"``
    ==================== ===============================================================================================

    As any module, effects that are given to several heads or layers are shared by them: one vocabulary and one set of
    thetas. For thetas of its own each needs `Effects` of its own, with a covariance of its own.

    Args:
        levels: Number of levels q, or their labels in the order of G; `Levels` may bring coordinates.
        effects: Names of the s effects of a level; a random intercept by default. With several, or with one that is
            not an intercept, a batch brings their values as a design of shape (m, s).
        covariance: G: a matrix over the levels for one effect; for several one over the s effects, the levels being
            independent, or one of size s · q with the level as the faster index. In a product only one factor may have
            a scale of its own. One variance, or an unstructured matrix over the effects, when left out.

    Attributes:
        G: Covariance of all effects, shape (s · q, s · q); element (a · q + l) is effect a of level l.
        labels: Labels of the levels, or None where they are numbers.
        num_levels: q.
        independent: Whether effects of different levels are uncorrelated at every θ.
        alike: Whether moreover all levels have the same covariance.

    Raises:
        TypeError: The covariance is no `Matrix`.
        ValueError: Labels or names repeat, there are no levels, or the covariance has another size.

    Example:
        >>> from openreml_nn.nn import Effects
        >>> subjects = Effects(["ann", "bob"], effects=["intercept", "time"])
        >>> subjects.encode(["bob", "eve", "ann"]).tolist()
        [1, -1, 0]
        >>> subjects.natural_names
        ['sigma^2_intercept', 'sigma_intercept_time', 'sigma^2_time']
    """

    def __init__(
        self, levels: int | Levels | Sequence[Any], effects: Sequence[str] = (INTERCEPT,),
        covariance: Matrix | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(effects, str) or not effects or len(set(effects)) != len(effects):
            raise ValueError(f"`Effects` needs a list of unique names of effects, got {effects!r}.")
        self.effects = list(effects)
        self.labels: list[str] | None = None
        if isinstance(levels, (int, np.integer)):
            self.num_levels = int(levels)
        else:
            self.labels = list((levels if isinstance(levels, Levels) else Levels(texts(levels))).labels)
            self.num_levels = len(self.labels)
        if self.num_levels < 1:
            raise ValueError(f"`Effects` needs at least one level, got {self.num_levels}.")
        self.G = self._covariance(covariance)
        theta = self.G.theta.detach()
        self.alike = self.G.common_block(theta, self.num_levels) is not None
        self.independent = self.alike or self.G.level_blocks(theta, self.num_levels) is not None

    def _covariance(self, given: Matrix | None) -> Matrix:
        q, s = self.num_levels, self.num_effects
        if given is None:
            given = ScalarMatrix(q) if s == 1 else UnstructuredMatrix(Levels(self.effects))
        if not isinstance(given, Matrix):
            raise TypeError(f"`Effects` needs a `Matrix` as covariance, got {type(given).__name__}.")
        if given.shape == (s * q, s * q):
            return given
        if s > 1 and given.shape == (s, s):
            return KroneckerProduct(given, IdentityMatrix(q))
        need = f"({q}, {q})" if s == 1 else f"({s}, {s}) or ({s * q}, {s * q})"
        raise ValueError(
            f"`Effects` with {q} levels and {s} effect{'s' * (s > 1)} needs a covariance of shape {need}, got "
            f"{given.shape}."
        )

    # ---- the vocabulary ----------------------------------------------------------------------------------------------

    @property
    def num_effects(self) -> int:
        """Effects of one level, s."""
        return len(self.effects)

    def encode(self, labels: Any) -> Tensor:
        """Codes of labels, shape (m,), int64; −1 for a label that is not a level.

        Labels are compared as text, and whole numbers alike whatever their type. Without labels of its own a level is
        its number, from 0, and names are refused.

        Args:
            labels: Column of labels, shape (m,): a list, array, Series or tensor.

        Returns:
            Codes, shape (m,), int64, on the CPU.

        Raises:
            ValueError: Labels are missing, or are names where the levels are numbers.
        """
        column = pd.Series(labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels)
        if column.isna().any():
            raise ValueError(f"`Effects.encode` got {int(column.isna().sum())} missing labels. Drop or name them.")
        codes, unique = pd.factorize(column)
        if self.labels is None:
            place = level_numbers(texts(unique), self.num_levels)
        else:
            place = pd.Index(self.labels).get_indexer(pd.Index(texts(unique), dtype=object)).astype(np.int64)
        return torch.from_numpy(place[codes] if len(place) else codes.astype(np.int64))

    @property
    def level_names(self) -> list[str]:
        """Labels of the levels; their numbers where there are none."""
        return [str(i) for i in range(self.num_levels)] if self.labels is None else list(self.labels)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def entry(self, given: Entry, rows: int, name: str, *, unknown: bool = False) -> tuple[Tensor, Tensor | None]:
        """Check what a batch says of this factor.

        Args:
            given: Codes of shape (m,), or (codes, design) with a design of shape (m, s).
            rows: Number of rows m.
            name: Name of the factor, for messages.
            unknown: Whether the code −1, a level that is not in the vocabulary, is allowed.

        Returns:
            Codes, int64, and the design in float64, or None for intercepts alone.

        Raises:
            TypeError: Not tensors.
            ValueError: Shapes or codes do not fit, or the design holds missing values.
        """
        return self.checked(given, rows, name, unknown=unknown)[:2]

    def checked(
        self, given: Entry, rows: int, name: str, *, unknown: bool = False
    ) -> tuple[Tensor, Tensor | None, bool]:
        """As ``entry``, and whether there are unknown levels, which the check has seen."""
        parts = tuple(given) if isinstance(given, (tuple, list)) else (given, None)
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts if part is not None):
            raise TypeError(
                f"{name!r} needs a tensor of codes, or (codes, design), got {_said(given)}. Of labels make codes by "
                f"`Effects.encode`."
            )
        codes, design = parts
        if codes.is_floating_point() or codes.ndim != 1:
            what = f"{codes.dtype} of shape {tuple(codes.shape)}"
            raise ValueError(f"{name!r} needs integer codes of shape ({rows},), one for each row, got {what}.")
        if len(codes) != rows:
            raise ValueError(f"{name!r} needs one code for each row, got {len(codes)} codes for {rows} rows.")
        if design is None and self.num_effects > 1:
            raise ValueError(f"{name!r} has the effects {self.effects} and needs (codes, design).")
        if design is not None and design.shape != (rows, self.num_effects):
            raise ValueError(
                f"{name!r} needs a design of shape ({rows}, {self.num_effects}) for the effects {self.effects}, got "
                f"{tuple(design.shape)}."
            )
        if design is not None and design.requires_grad:
            raise ValueError(f"{name!r} got a design that requires a gradient; it gets none here. Detach it.")
        lowest = self._require_values(codes, design, name, unknown) if rows else 0
        return codes.long(), None if design is None else design.to(torch.float64), lowest < 0

    def _require_values(self, codes: Tensor, design: Tensor | None, name: str, unknown: bool) -> int:
        """The lowest code; a ValueError for codes out of range or a design with gaps; one look at the device."""
        known = [] if design is None else [torch.isfinite(design).all().to(codes.dtype)]
        low, high, *finite = torch.stack([*torch.aminmax(codes), *known]).tolist()
        if high >= self.num_levels or low < (-1 if unknown else 0):
            hint = "" if unknown or low != -1 else (
                " (−1 is an unknown level. The likelihood needs the level of each row: leave such rows out, or make "
                "them levels of their own.)")  # fmt: skip
            bad = high if high >= self.num_levels else low
            raise ValueError(f"{name!r} has codes from 0 to {self.num_levels - 1}, got {bad}.{hint}")
        if not all(finite):
            raise ValueError(f"The design of {name!r} holds missing or infinite values. Leave such rows out.")
        return low

    def incidence(self, codes: Tensor, design: Tensor | None) -> IncidenceMatrix:
        """Z of rows, shape (m, s · q); a row of zeros for the code −1."""
        return IncidenceMatrix(codes, self.level_names, design, self.effects)

    def average_level(self) -> Tensor:
        """Covariance of the effects of an average level, shape (s, s): what is known of one that is not in G."""
        common = self.G.common_block(self.G.theta, self.num_levels)
        if common is not None:
            return common
        place = torch.arange(self.G.shape[0], device=self.G.theta.device).reshape(-1, self.num_levels)
        return self.G.entries(self.G.theta, place[:, None], place[None]).mean(2)

    def row_variance(self, codes: Tensor, design: Tensor | None) -> Tensor:
        """Variance z'Gz of the random effects of each row, shape (m,); for the code −1 that of an average level."""
        theta, s = self.G.theta, torch.arange(self.num_effects, device=codes.device)
        place = s[:, None] * self.num_levels + codes.clamp(min=0)
        own = self.G.entries(theta, place[:, None], place[None])
        own = torch.where(codes >= 0, own, self.average_level()[:, :, None])
        x = own.new_ones(1, len(codes)) if design is None else design.to(own.dtype).mT
        return torch.einsum("am,abm,bm->m", x, own, x)

    # ---- thetas ------------------------------------------------------------------------------------------------------

    @property
    def natural_names(self) -> list[str]:
        """Names of the variance parameters on their natural scale."""
        return self.G.natural_names

    # ---- saving ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        levels = self.num_levels if self.labels is None else list(self.labels)
        return {"levels": levels, "effects": list(self.effects), "fixed": fixed_values(self.G)}

    def set_extra_state(self, state: Any) -> None:
        """Compare the levels, the effects and the fixed values of G of a saved state with these.

        Raises:
            ValueError: They differ; the message says in what.
        """
        if list(state["effects"]) != self.effects:
            raise ValueError(f"The state has the effects {state['effects']}, these are {self.effects}.")
        saved, own = state["levels"], self.num_levels if self.labels is None else self.labels
        if saved != own:
            raise ValueError(f"The state is of other levels: {difference(saved, own)}.")
        other = differing(state.get("fixed", {}), fixed_values(self.G))
        if other:
            raise ValueError(
                f"The state is of another covariance: of what G has fixed, {', '.join(other)} differs. Give `Effects` "
                f"the covariance of the training, or fit anew."
            )

    def extra_repr(self) -> str:
        return f"{self.num_levels} levels, effects={self.effects}"


def _said(given: Any) -> str:
    if not isinstance(given, (tuple, list)):
        return type(given).__name__
    return f"{len(given)} parts" if len(given) != 2 else f"({', '.join(type(part).__name__ for part in given)})"
