"""What a fit depends on as short digests, so that a checkpoint, or another process, is known to have other data.

Where processes read rows of their own, the digest of a table is the sum of one number for each row. It is the same
however many processes share the rows, and a fit may go on from a checkpoint on another number of them.
"""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from openreml_nn.covariance import CovariancePropagation, IncidenceMatrix, Matrix, Sum
from openreml_nn.lightning.batches import Batch
from openreml_nn.solvers import Ranks

ROWS, RESPONSE, FIXED, TOGETHER = "number of rows", "the response", "the fixed effects", "the rows"


def fingerprint(batch: Batch, V: Matrix) -> dict[str, str]:
    """The number of rows, and digests of y, of X, and of the numbers in each term of V.

    Args:
        batch: The data. Where it has only the rows of one of several processes, all of them call this, and what is
            said of a term is its levels.
        V: The covariance of all records.
    """
    if batch.whole is None and batch.V is not None:
        return _of_shared_rows(batch)
    batch = batch.whole or batch
    terms = dict(zip(V.operand_names, V.operand_list(), strict=True)) if isinstance(V, Sum) else {"V": V}
    return {
        ROWS: str(len(batch.y)),
        RESPONSE: _digest([batch.y]),
        FIXED: _digest([] if batch.X is None else [batch.X]),
    } | {f"the term {name!r}": _digest(term.buffers()) for name, term in terms.items()}


def _of_shared_rows(batch: Batch) -> dict[str, str]:
    """As `fingerprint`, of the rows of all processes: digests of y, of X, of the levels in each term, and of all."""
    X = batch.y[:, None][:, :0] if batch.X is None else batch.X
    columns = {RESPONSE: _bits(batch.y[:, None]), FIXED: _bits(X)} | _levels(batch.V)
    own = {name: row_sum(part) for name, part in columns.items()}
    own[TOGETHER] = row_sum(np.concatenate(list(columns.values())))
    parts = batch.ranks.objects((len(batch.y), own))
    sums = {name: sum(sums[name] for _, sums in parts) % 2**64 for name in own}
    return {ROWS: str(sum(count for count, _ in parts))} | {name: f"{total:016x}" for name, total in sums.items()}


def _levels(V: Matrix | None) -> dict[str, np.ndarray]:
    """For each term by levels: their labels, as numbers, and the values of the effects in each row, shape (k, n)."""
    operands = zip(V.operand_names, V.operand_list(), strict=True) if isinstance(V, Sum) else ()
    designs = {name: term.Z for name, term in operands if isinstance(term, CovariancePropagation)}
    found = {}
    for name, Z in designs.items():
        if isinstance(Z, IncidenceMatrix):
            labels = np.array([*map(str, Z.labels), ""], dtype=object)  # the last one is that of rows without a level
            level = pd.util.hash_array(labels)[Z.codes.cpu().numpy()]
            values = [_bits(own) for own in Z.buffers() if own is not Z.codes]
            found[f"the term {name!r}"] = np.concatenate([level[None], *values])
    return found


def _bits(values: Tensor) -> np.ndarray:
    """The bits of rows of numbers, shape (n, p) or (n,), as integers without a sign, shape (p, n)."""
    rows = values.detach().cpu().reshape(len(values), -1).double().numpy()
    return np.ascontiguousarray(rows.T).view(np.uint64)


def row_sum(columns: np.ndarray) -> int:
    """The sum modulo 2⁶⁴ of a number for each row, which depends on every bit of it but not on its place.

    Args:
        columns: Integers without a sign, shape (p, n).

    Source: the mixing function is that of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA, 453-472).
    """
    state = np.zeros(columns.shape[1], dtype=np.uint64)
    for column in columns:
        state = _mixed(state + column)
    return int(state.sum(dtype=np.uint64))


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In what two fingerprints differ, in words."""
    rows = [data.get(ROWS) for data in (before, now)]
    if rows[0] != rows[1]:
        return f"it had {rows[0]} rows, this table has {rows[1]}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    several = len(names) > 1 or names[0].endswith("s")
    return f"{' and '.join(names)} {'differ' if several else 'differs'}"


def require_same_data(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise a ValueError where the data are not those of the fit in a checkpoint.

    Args:
        before: Fingerprint of the fit in the checkpoint.
        now: Fingerprint of the data.
    """
    if before != now:
        raise ValueError(
            f"The checkpoint is of a fit to other data: {difference(before, now)}. A fit goes on from its own table, "
            f"and BLUEs and BLUPs are recomputed from it. Give the table of the fit; rows to predict or to validate on "
            f"are a table of their own."
        )


def require_known_sharing(batch: Batch, V: Matrix, ranks: Ranks) -> None:
    """Raise a ValueError on all processes where they have different records and the batch does not say so.

    Args:
        batch: The data of this process.
        V: The covariance of all records.
        ranks: All processes of the Trainer.
    """
    if ranks.size == 1 or batch.ranks.size > 1:
        return
    prints = ranks.objects(fingerprint(batch, V))
    other = next((place for place, own in enumerate(prints) if own != prints[0]), None)
    if other is not None:
        raise ValueError(
            f"Process {other + 1} of {ranks.size} has other data than process 1: "
            f"{difference(prints[0], prints[other])}. Use `MixedModelDataModule`, or a `Batch` with `V`, of the rows "
            f"of a process, and `ranks`."
        )


def _digest(values: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        array = value.detach().cpu().contiguous()
        digest.update((array.double() if array.is_floating_point() else array).numpy().tobytes())
    return digest.hexdigest()
