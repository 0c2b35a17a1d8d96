"""Labels of levels as text, as numbers, and how two vocabularies differ."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

_WHOLE = re.compile(r"0|-?[1-9][0-9]*")


def texts(values: Iterable[Any]) -> list[str]:
    """Values as text; whole numbers without a point."""
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    return [str(int(v)) if isinstance(v, (float, np.floating)) and float(v).is_integer() else str(v) for v in values]


def level_numbers(labels: list[str], count: int) -> np.ndarray:
    """The level that each text is the number of, as it is written: ``"1"``, not ``"01"`` or ``"True"``.

    Returns:
        Levels from 0 to ``count`` − 1, shape (m,), int64; −1 for other whole numbers.

    Raises:
        ValueError: A text is no whole number.
    """
    names = [text for text in labels if not _WHOLE.fullmatch(text)]
    if names:
        raise ValueError(
            f"`Effects.encode` got labels that are no whole numbers, {', '.join(map(repr, names[:3]))}, and these "
            f"{count} levels are numbers, from 0. Make the effects of their labels, "
            f"`Effects(sorted(set(labels)))`."
        )
    return np.array([int(x) if 0 <= int(x) < count else -1 for x in labels], dtype=np.int64)


def difference(saved: int | list[str], own: int | list[str]) -> str:
    """In what two vocabularies differ, each a number of levels or their labels, in words."""
    if isinstance(saved, int) or isinstance(own, int):
        said = [f"{x} levels without labels" if isinstance(x, int) else f"{len(x)} levels with labels"
                for x in (saved, own)]  # fmt: skip
        return f"it has {said[0]}, here are {said[1]}"
    gone, new = sorted(set(saved) - set(own)), sorted(set(own) - set(saved))
    if not gone and not new:
        place = next(i for i, (a, b) in enumerate(zip(saved, own, strict=True)) if a != b)
        return f"the order differs, first at level {place}, {saved[place]!r} there and {own[place]!r} here"
    parts = [f"{len(names)} only {where} ({', '.join(names[:5])}{', …' * (len(names) > 5)})"
             for names, where in ((gone, "in the state"), (new, "here")) if names]  # fmt: skip
    return " and ".join(parts)
