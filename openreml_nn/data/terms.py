"""A random or residual term as a user says it: which groups, which effects in each, and how they vary together.

A term is a specification without data, so that it can be written in Python or in YAML and used for any table; sizes,
levels and labels come from the table. What it becomes is in `openreml_nn.data.effects` and `openreml_nn.data.residual`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from openreml_nn.covariance import Levels, Matrix
from openreml_nn.data.kernels import Kernel

Structure: TypeAlias = Callable[[Levels], Matrix] | Kernel
"""What makes a matrix over levels: the class of a structure, a ``functools.partial`` of it, a function, a `Kernel`."""


@final
@dataclass(frozen=True)
class Term:
    r"""One term of V: Z (C ⊗ K) Z', C the covariance of the effects of one group and K the relationship of groups.

    As a residual term, no groups and no ``within`` mean that each row is its own group: V is diagonal,
    :math:`V_{ii} = x_i' C x_i` with :math:`x_i` the row's ``design``, and without a ``design`` the ``covariance`` is
    one over the rows, by default σ² I.

    In a product of structures the first one has the variance; in each further one a parameter that scales it is held at
    1. Where a ``relationship`` has a variance and there is one effect and no ``covariance``, it is G alone.

    Args:
        groups: Column or columns whose observed combinations are the groups; ``"rep:block"`` is ``["rep", "block"]``.
            None for a single group of all rows.
        design: Wilkinson formula whose columns are the effects that each group has: ``"1"``, ``"1 + Days"``,
            ``"0 + Variety"``.
        covariance: Structure over the effects, or over the levels of ``within``. By default one variance for one effect
            and an unstructured matrix for several.
        relationship: Structure over the groups, independent by default. A `Kernel` brings its own levels.
        within: Column that indexes the correlated effects of a group, such as the time; a list of columns is
            coordinates. A dictionary from columns to structures is a separable product, in its order:
            ``{"row": AR1Matrix, "col": AR1Matrix}``; it replaces ``covariance``.

    Raises:
        ValueError: Arguments that do not go together.
        TypeError: A structure that is already built where its class, or a ``functools.partial``, is needed.

    Example:
        >>> from openreml_nn.covariance import AR1Matrix
        >>> from openreml_nn.data import Term
        >>> slopes = Term(groups="Subject", design="1 + Days")
        >>> serial = Term(groups="Subject", within="age", covariance=AR1Matrix)
    """

    groups: str | list[str] | None = None
    design: str = "1"
    covariance: Structure | None = None
    relationship: Structure | None = None
    within: str | list[str] | dict[str, Structure] | None = None

    def __post_init__(self) -> None:
        separable = self.within if isinstance(self.within, dict) else {}
        structures = {"covariance": self.covariance, "relationship": self.relationship} | separable
        for name, structure in structures.items():
            if isinstance(structure, Matrix) or not (structure is None or callable(structure)):
                raise TypeError(
                    f"`Term` needs for {name!r} a class or function from levels to a matrix, since sizes come from the "
                    f"table, got {type(structure).__name__}. Give the class, functools.partial(Class, option=...), or "
                    f"for a known matrix Kernel('K.csv')."
                )
        for field in ("groups", "within"):
            if getattr(self, field) in ("", [], {}):
                raise ValueError(f"`Term` got an empty `{field}`. Name a column, or leave it out.")
        if self.within is not None and self.design != "1":
            raise ValueError("`Term` takes `within` or `design`, not both: each says which effects a group has.")
        if separable and self.covariance is not None:
            raise ValueError("`Term` takes a dictionary as `within` or a `covariance`, not both.")
        if self.within is not None and not separable and self.covariance is None:
            raise ValueError("`Term` with `within` needs a `covariance` over its levels, such as AR1Matrix.")
        if self.groups is None and self.relationship is not None:
            raise ValueError("`Term` with a `relationship` needs the `groups` that it relates.")


TermLike: TypeAlias = Term | str | list[str]
"""A term, or for one variance a column or a list of columns."""


def as_term(spec: TermLike, name: str) -> Term:
    """A term from its short form: a column, or a list of them, is one variance for their levels.

    Raises:
        TypeError: It is neither a `Term` nor names of columns; the message has the ``name``.
    """
    if isinstance(spec, Term):
        return spec
    if isinstance(spec, str) or (isinstance(spec, (list, tuple)) and all(isinstance(part, str) for part in spec)):
        return Term(groups=spec if isinstance(spec, str) else list(spec))
    raise TypeError(f"Term {name!r} must be a `Term` or the names of columns, got {type(spec).__name__}.")
