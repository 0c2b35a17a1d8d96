"""Tables as a person reads them: aligned, six digits, notes in words."""

import math

import numpy as np
import pandas as pd


def variance_text(variance: pd.DataFrame, correlations: np.ndarray) -> str:
    """The table of variance parameters, shares in percent, with a note where one is fixed or on a boundary.

    Args:
        variance: The table, as `FitResult.variance` gives it.
        correlations: The correlation beside each covariance, NaN beside every other parameter, shape (m,).
    """
    table = variance.rename(columns={"std_error": "std. error"}).drop(columns=["boundary", "fixed"])
    table["share"] = [f"{100 * share:.1f} %" if math.isfinite(share) else "" for share in table["share"]]
    if np.isfinite(correlations).any():
        table["correlation"] = [f"{r:.3f}" if math.isfinite(r) else "" for r in correlations]
    table["note"] = [
        "boundary" if boundary else "fixed" if fixed else ""
        for boundary, fixed in zip(variance["boundary"], variance["fixed"], strict=True)
    ]
    return aligned_text(table if (table["note"] != "").any() else table.drop(columns="note"))


def aligned_text(table: pd.DataFrame) -> str:
    """The table with numbers to six digits and names to the left."""
    text = table.copy()
    for column in text.columns:
        if text[column].dtype.kind == "f":
            text[column] = [f"{value:.6g}" if math.isfinite(value) else "-" for value in text[column]]
    width = max(len(str(name)) for name in text["name"])
    text["name"] = [f"{name:<{width}}" for name in text["name"]]
    rows = text.rename(columns={"name": f"{'name':<{width}}"}).to_string(index=False)
    return "\n".join(f"  {row}" for row in rows.split("\n"))
