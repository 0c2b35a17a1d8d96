"""The tables that `benchmark_peers.py` prints, and the comparison of estimates in them."""

import math
import statistics

from peers.report import Outcome

SHARE = 5e-4  # four significant digits
SHARE_LOGLIK = 1e-6
SMALL = 0.1  # an estimate below this share of the largest one is compared on the scale of that share
HEADER = ("program", "version", "median s", "× ours", "steps", "solver", "digits", "Δℓ", "peak MiB", "above", "note")


def compare(outcome: Outcome, reference: Outcome) -> tuple[float, float, bool]:
    """Digits of the variances that agree, difference of ℓ, and whether both suffice; NaN where there is nothing."""
    digits, difference, agree = math.nan, outcome.loglik - reference.loglik, True
    if outcome.variances and reference.variances:
        if set(outcome.variances) != set(reference.variances):
            return 0.0, difference, False
        floor = SMALL * max(abs(value) for value in reference.variances.values())
        error = max(
            abs(value - reference.variances[name]) / max(abs(reference.variances[name]), floor)
            for name, value in outcome.variances.items()
        )
        digits, agree = -math.log10(max(error, 1e-16)), error <= SHARE
    if not math.isnan(difference):
        agree = agree and abs(difference) <= SHARE_LOGLIK * max(1.0, abs(reference.loglik))
    return digits, difference, agree


def lines(outcomes: list[Outcome]) -> tuple[list[str], bool]:
    """A table of the programs on one workload, the first of them ours; and whether all estimates agree."""
    rows: list[tuple[str, ...]] = [HEADER]
    all_agree = True
    ours = outcomes[0]
    base = statistics.median(ours.seconds) if ours.seconds else math.nan
    by_name = {outcome.program: outcome for outcome in outcomes}
    for outcome in outcomes:
        if not outcome.seconds:
            why = f"not installed ({outcome.missing})" if outcome.missing else f"FAILED: {outcome.failed}"
            rows.append((outcome.program, outcome.version, *["–"] * 8, why))
            continue
        reference = by_name.get("openreml_nn, ML", ours) if outcome.program.endswith(", ML") else ours
        digits, difference, agree = compare(outcome, reference)
        all_agree &= agree
        median = statistics.median(outcome.seconds)
        same = outcome is reference
        once = " (one fit)" if len(outcome.seconds) == 1 else ""
        rows.append((
            outcome.program,
            outcome.version,
            f"{median:.4f}",
            f"{median / base:.2f}",
            str(outcome.iterations) if outcome.iterations >= 0 else "–",
            outcome.solver or "–",
            "–" if same else cell(digits, ".1f") + ("" if agree else "!"),
            "–" if same else cell(difference, "+.1e"),
            cell(outcome.peak, ".0f"),
            cell(outcome.above, ".0f"),
            f"{outcome.note}{once}".strip(),
        ))  # fmt: skip
    return aligned(rows), all_agree


def cell(value: float, form: str) -> str:
    """A number, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of a table with columns of one width: text to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = {0, 1, 5, len(widths) - 1}
    return [
        "  ".join(text.ljust(width) if k in left else text.rjust(width)
                  for k, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
