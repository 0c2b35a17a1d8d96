"""The terms of a model as a user gives them: their names, and what can be wrong with them."""

from collections.abc import Mapping, Sequence

from openreml_nn.data.effects import Effects
from openreml_nn.data.terms import Term, TermLike, as_term


def named_terms(random: Mapping[str, TermLike] | Sequence[str | list[str]] | str | None) -> dict[str, Term]:
    """Random terms by name, from a dictionary or from columns, which then name their term.

    Raises:
        TypeError: A term in a list is not one by its columns, and so has no name.
        ValueError: A name occurs twice.
    """
    if random is None:
        return {}
    if isinstance(random, Mapping):
        return {str(name): as_term(spec, str(name)) for name, spec in random.items()}
    specs = [random] if isinstance(random, str) else list(random)
    for spec in specs:
        if isinstance(spec, Term):
            raise TypeError("A `Term` in a list of random terms has no name. Give a dictionary: {'name': Term(...)}.")
    terms = [as_term(spec, str(spec)) for spec in specs]
    names = [spec if isinstance(spec, str) else ":".join(spec) for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"The random term {twice[0]!r} is given twice. Leave one out.")
    return dict(zip(names, terms, strict=True))


def check_random(effects: Effects, n: int, plain_residual: bool, count: int | None = None) -> None:
    """Raise a ValueError that names a random term whose variance cannot be told from the mean or from the residual.

    Args:
        effects: The term over its table.
        n: Number of rows.
        plain_residual: Whether the residual is σ² I.
        count: Number of groups with records; those of ``effects`` when left out.
    """
    name, term = effects.name, effects.term
    count = count or (1 if effects.groups is None else len(effects.groups.observed))
    if effects.cells:
        if count * len(effects.effects) == 1:
            raise ValueError(f"Term {name!r} has one level of `within`, so that nothing varies. Leave the term out.")
        return
    if count == 1 and (term.groups is not None or len(effects.effects) == 1):
        which = f"{effects.groups.observed[0]!r} of {effects.groups.name!r}" if effects.groups else "all rows"
        raise ValueError(f"Term {name!r} has one level ({which}), so that it has no variance. Leave the term out.")
    if count == 1 and term.covariance is None:
        raise ValueError(
            f"Term {name!r} has no groups and {len(effects.effects)} effects, whose covariances cannot be estimated. "
            f"Give a `covariance` with few parameters, such as ScalarMatrix, or `groups`."
        )
    if (
        plain_residual
        and term.relationship is None
        and (term.covariance is None or len(effects.effects) == 1)
        and (count * len(effects.effects) >= n)
    ):
        what = f"{count} levels" + (f" × {len(effects.effects)} effects" if len(effects.effects) > 1 else "")
        raise ValueError(
            f"Term {name!r} has {what} for {n} rows, so that it is confounded with the residual σ² I. Leave the term "
            f"out, give it a `relationship` between its levels, or give the residual another structure."
        )


def check_names(random: Mapping[str, Term], residual: Mapping[str, Term]) -> None:
    """Raise a ValueError that says which name of a term, or which two terms, cannot be used."""
    if {"class_path", "init_args"} & {*random, *residual}:
        raise ValueError("A term takes its fields directly (groups, within, …), without `class_path` and `init_args`.")
    for name in [*random, *residual]:
        if not name or "/" in name:
            raise ValueError(f"A term needs a name without '/', got {name!r}.")
    if not residual:
        raise ValueError("`residual` is an empty dictionary. Name at least one residual term, or leave it out.")
    for name, term in residual.items():
        if not isinstance(term, Term):
            raise TypeError(f"Residual term {name!r} must be a `Term`, got {type(term).__name__}.")
    both = [name for name in random if name in residual]
    if both:
        raise ValueError(f"The name {both[0]!r} is given to a random and to a residual term. Rename one.")
    for kind, terms in (("random", list(random.items())), ("residual", list(residual.items()))):
        for i, (name, term) in enumerate(terms):
            same = [other for other, earlier in terms[:i] if earlier == term]
            if same:
                raise ValueError(f"The {kind} terms {same[0]!r} and {name!r} are the same. Leave one out.")
