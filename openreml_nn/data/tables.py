"""Tables from wherever they are: a DataFrame, a file, or one of the small tables that come with the package."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

TableLike: TypeAlias = pd.DataFrame | str | Path

_BUNDLED = Path(__file__).parent / "tables"
_SUFFIXES = (".csv", ".csv.gz", ".parquet")
# Options of `pandas.read_csv`: before 3.1 its default may be wrong in the last digit of a number.
EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)


def bundled_tables() -> list[str]:
    """Names of the tables that come with the package, sorted; ``tables/SOURCES.md`` says where they come from."""
    return sorted(path.name.removesuffix(_suffix(path)) for path in _BUNDLED.iterdir() if _suffix(path))


def table_path(name: str) -> Path:
    """File of the bundled table ``name``.

    Raises:
        ValueError: There is no such table; the message lists those there are.
    """
    for suffix in _SUFFIXES:
        path = _BUNDLED / f"{name}{suffix}"
        if path.is_file():
            return path
    raise ValueError(f"There is no bundled table {name!r}. Bundled tables: {', '.join(bundled_tables())}.")


def find_table(source: str | Path) -> Path:
    """File that ``source`` means: an existing path to CSV or Parquet, else the bundled table of this name.

    Raises:
        ValueError: There is no such file or bundled table, or a file that exists is neither CSV nor Parquet.
    """
    path = Path(source)
    if path.is_file():
        if not _suffix(path):
            raise ValueError(f"A table must be {', '.join(_SUFFIXES)}, got {str(path)!r}. Convert it to one of these.")
        return path
    if _suffix(path) or len(path.parts) > 1:
        raise ValueError(f"There is no file {str(path)!r} (looked from {Path.cwd()}). Check the path.")
    names = bundled_tables()
    if str(source) in names:
        return table_path(str(source))
    near = get_close_matches(str(source), names, 1)
    raise ValueError(
        f"{str(source)!r} is neither a file nor a bundled table{f'; did you mean {near[0]!r}?' if near else '.'} "
        f"Bundled tables: {', '.join(names)}."
    )


def read_table(source: TableLike) -> pd.DataFrame:
    """Table of one row per record.

    Args:
        source: A DataFrame, returned as it is; a path to .csv, .csv.gz or .parquet; or the name of a bundled table.

    Raises:
        ValueError: There is no such file or table.

    Example:
        >>> from openreml_nn.data import read_table
        >>> read_table("john_alpha").shape
        (72, 7)
    """
    if isinstance(source, pd.DataFrame):
        return source
    path = find_table(source)
    return pd.read_parquet(path) if path.name.lower().endswith(".parquet") else pd.read_csv(path, **EXACT)


def _suffix(path: Path) -> str:
    """The ending of a file that can be read, or an empty string."""
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), "")
