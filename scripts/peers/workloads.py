"""The data of the benchmarks: one function for each workload, seeded, and how they travel to another process.

A workload has a table (y and the columns of its factors), the design X of its fixed effects, and what else its model
needs, such as a kernel K. Everything is saved as one .npz, for R as .csv, and read again by whoever fits it. This file
needs NumPy alone, because the interpreter of a peer reads it too.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

Array = np.ndarray


@dataclass
class Data:
    """One workload of one size.

    Attributes:
        workload: Name of the workload.
        size: Its size, in words.
        table: Columns of the table, y among them.
        X: Design of the fixed effects, shape (n, p).
        more: Other arrays.
    """

    workload: str
    size: str
    table: dict[str, Array]
    X: Array
    more: dict[str, Array] = field(default_factory=dict)

    @property
    def y(self) -> Array:
        """The response, shape (n,)."""
        return self.table["y"]

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.y)

    @property
    def constant(self) -> float:
        """−½ (n − p) log 2π, which some programs leave out of the restricted likelihood."""
        return -0.5 * (self.n - self.X.shape[1]) * float(np.log(2.0 * np.pi))

    @property
    def half_logdet_XtX(self) -> float:
        """½ log|X'X|, which some programs add to the restricted likelihood."""
        return 0.5 * float(np.linalg.slogdet(self.X.T @ self.X)[1])


def save(data: Data, folder: Path) -> None:
    """Write a workload to a folder."""
    arrays = {f"table {name}": column for name, column in data.table.items()}
    arrays |= {f"more {name}": array for name, array in data.more.items()} | {"X": data.X}
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    (folder / "data.json").write_text(json.dumps({"workload": data.workload, "size": data.size}))


def load(folder: Path) -> Data:
    """Read a workload from a folder."""
    about = json.loads((folder / "data.json").read_text())
    arrays = dict(np.load(folder / "data.npz"))
    table, more = (
        {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
        for kind in ("table ", "more ")
    )
    return Data(about["workload"], about["size"], table, arrays["X"], more)


# ---- one function for each workload ----------------------------------------------------------------------------------


def insteval(table: dict[str, Array], interaction: bool) -> Data:
    """Ratings of lecturers by students: y ~ service + (1 | s) + (1 | d), or service × dept."""
    service = _dummies(table["service"])
    X = [np.ones(len(service)), *service.T]
    if interaction:
        dept = _dummies(table["dept"])
        X += [*dept.T, *(dept * service[:, :1]).T]
    name = "insteval_dept" if interaction else "insteval"
    table = table | {"service": np.char.add("service", table["service"].astype(str)),
                     "dept": np.char.add("dept", table["dept"].astype(str))}  # fmt: skip
    return Data(name, f"n = {len(service)}", table, np.stack(X, axis=1))


def million(subjects: int, rows: int = 10) -> Data:
    """Repeated measures with a correlated intercept and slope for each subject."""
    rng = np.random.default_rng(1)
    subject = np.repeat(np.arange(subjects), rows)
    x = rng.uniform(-1.0, 1.0, len(subject))
    b = rng.standard_normal((subjects, 2)) @ np.linalg.cholesky([[1.0, 0.3], [0.3, 0.5]]).T
    y = 1.0 + 0.5 * x + b[subject, 0] + b[subject, 1] * x + rng.standard_normal(len(x))
    size = f"n = {len(y)}, {subjects} subjects"
    return Data("million", size, {"y": y, "x": x, "subject": subject}, np.stack([np.ones(len(x)), x], axis=1))


def kernel(n: int) -> Data:
    """One record for each of n individuals whose relationship K is known and positive definite; a second response."""
    rng = np.random.default_rng(2)
    K = _relationship(rng, n)
    X = np.stack([np.ones(n), *rng.standard_normal((2, n))], axis=1)
    root = np.linalg.cholesky(K)
    y, y2 = (X.sum(1) + root @ rng.standard_normal(n) + rng.standard_normal(n) for _ in range(2))
    table = {"y": y, "x1": X[:, 1], "x2": X[:, 2], "genotype": np.arange(n)}
    return Data("kernel", f"n = {n}", table, X, {"K": K, "y2": y2})


def alpha(n: int, block: int = 4, reps: int = 3) -> Data:
    """One alpha-lattice trial of n plots: genotype i + j s of rep r stands in block (i + r j) mod s of the s blocks.

    Two genotypes meet at most once. Source: Patterson & Williams (1976), Biometrika 63, 83-92.
    """
    genotypes = n // reps
    s = genotypes // block
    rep, gen = np.repeat(np.arange(reps), genotypes), np.tile(np.arange(genotypes), reps)
    return _lattice("alpha", f"n = {n}", rep, (gen % s + rep * (gen // s)) % s, gen)


def trials(n: int, same: bool = False) -> Data:
    """n/72 alpha-lattice trials of 3 reps with 6 blocks of 4 plots, of genotypes of their own or of the same 24."""
    one = alpha(72).more
    trial = np.repeat(np.arange(n // 72), 72)
    rep, block, gen = (np.tile(one[name], n // 72) for name in ("rep", "block", "gen"))
    name, size = "trials24" if same else "trials", f"n = {n}, {n // 72} trials"
    return _lattice(name, size, rep, 6 * trial + block, gen if same else 24 * trial + gen)


def _lattice(name: str, size: str, rep: Array, block: Array, gen: Array) -> Data:
    """Yields of plots, from codes of rep, of block within rep, and of genotype."""
    rng = np.random.default_rng(3)
    n = len(rep)
    effects = rng.normal(0.0, 0.4, gen.max() + 1)[gen] + rng.normal(0.0, 0.25, (3, block.max() + 1))[rep, block]
    y = 4.0 + 0.3 * rep + effects + rng.normal(0.0, 0.3, n)
    labels = {"rep": rep, "block": block, "gen": gen}
    table = {"y": y} | {column: np.char.add(column, codes.astype(str)) for column, codes in labels.items()}
    table["rep_block"] = np.char.add(np.char.add(table["rep"], ":"), table["block"])
    X = np.column_stack([np.ones(n), rep == 1, rep == 2]).astype(float)
    return Data(name, size, table, X, labels)


def ar1(subjects: int, times: int = 10) -> Data:
    """Repeated measures with a random intercept and a first-order autoregressive residual."""
    rng = np.random.default_rng(4)
    e = np.empty((subjects, times))
    e[:, 0] = rng.standard_normal(subjects)
    for t in range(1, times):
        e[:, t] = 0.6 * e[:, t - 1] + 0.8 * rng.standard_normal(subjects)
    time = np.tile(np.arange(times), subjects)
    y = 1.0 + 0.1 * time + np.repeat(rng.normal(0.0, 0.8, subjects), times) + e.ravel()
    table = {"y": y, "time": time, "subject": np.repeat(np.arange(subjects), times)}
    return Data("ar1", f"{subjects} subjects × {times}", table, np.stack([np.ones(len(y)), time.astype(float)], axis=1))


def traits(genotypes: int, count: int = 4) -> Data:
    """Several traits of related genotypes, one record of each; rows sorted by trait, genotypes fastest."""
    rng = np.random.default_rng(5)
    K = _relationship(rng, genotypes)
    among = [_random_covariance(rng, count) for _ in range(2)]
    g = np.linalg.cholesky(K) @ rng.standard_normal((genotypes, count)) @ np.linalg.cholesky(among[0]).T
    e = rng.standard_normal((genotypes, count)) @ np.linalg.cholesky(among[1]).T
    trait = np.repeat(np.arange(count), genotypes)
    y = (np.arange(count) + g + e).T.ravel()
    table = {"y": y, "trait": np.char.add("t", trait.astype(str)), "genotype": np.tile(np.arange(genotypes), count)}
    X = (trait[:, None] == np.arange(count)).astype(float)
    return Data("traits", f"{count} traits × {genotypes}", table, X, {"K": K})


def dense(n: int, k: int) -> Data:
    """k crossed factors of n/10 levels."""
    rng = np.random.default_rng(6)
    codes = [rng.permutation(n) % (n // 10) for _ in range(k)]
    y = rng.standard_normal(n) + np.sum([rng.standard_normal(n // 10)[code] for code in codes], axis=0)
    X = np.column_stack([np.ones(n), rng.standard_normal((n, 4))])
    return Data("dense", f"n = {n}, k = {k}", {"y": y} | {f"factor{i}": code for i, code in enumerate(codes)}, X)


def markers(n: int, count: int) -> Data:
    """n records and genotypes at many markers, W, which `marker_matrix` makes again where it is needed."""
    rng = np.random.default_rng(7)
    effects = rng.standard_normal(count) / np.sqrt(count)
    y = 1.0 + rng.standard_normal(n)
    for rows, W in marker_rows(n, count):
        y[rows] += W @ effects
    size = f"n = {n}, {count} markers"
    return Data("markers", size, {"y": y}, np.ones((n, 1)), {"markers": np.array(count)})


def marker_rows(n: int, count: int) -> Iterator[tuple[slice, Array]]:
    """W in pieces of rows, so that it need not be there twice: genotypes 0, 1, 2, scaled."""
    rng = np.random.default_rng(8)
    frequency = rng.uniform(0.1, 0.5, count)
    for first in range(0, n, 1000):
        rows = slice(first, min(first + 1000, n))
        counts = rng.binomial(2, frequency, (rows.stop - first, count))
        yield rows, (counts - 2 * frequency) / np.sqrt(2 * frequency * (1 - frequency))


def marker_matrix(data: Data) -> Array:
    """W of the markers workload, shape (n, number of markers)."""
    W = np.empty((data.n, int(data.more["markers"])))
    for rows, part in marker_rows(*W.shape):
        W[rows] = part
    return W


def sizes(workload: str, small: bool, largest: bool, marker_size: tuple[int, int]) -> list[Callable[[], Data]]:
    """What makes the data of a simulated workload, one for each of its sizes."""
    kernels = [300] if small else [1000, 2000, 4000, *([8000] if largest else [])]
    lattices = [288] if small else [288, 1152, 4608]
    table: dict[str, list[Callable[[], Data]]] = {
        "million": [partial(million, 500 if small else 100_000)],
        "kernel": [partial(kernel, n) for n in kernels],
        "alpha": [partial(alpha, n) for n in lattices],
        "trials": [partial(trials, n) for n in lattices],
        "trials24": [partial(trials, n, True) for n in lattices],
        "ar1": [partial(ar1, 200 if small else 2000)],
        "traits": [partial(traits, g) for g in ([40] if small else [250, 1000])],
        "dense": [partial(dense, n, 3 if small else 6) for n in ([300] if small else [2000, 4000])],
        "markers": [partial(markers, *((600, 50) if small else marker_size))],
    }
    return table[workload]


def _relationship(rng: np.random.Generator, n: int) -> Array:
    """A genomic relationship of n individuals from 2 n markers, positive definite."""
    M = rng.standard_normal((n, 2 * n))
    return M @ M.T / (2 * n)


def _random_covariance(rng: np.random.Generator, size: int) -> Array:
    A = rng.standard_normal((size, 2 * size))
    return A @ A.T / (2 * size) + 0.2 * np.eye(size)


def _dummies(column: Array) -> Array:
    """Indicators of all levels but the first, shape (n, levels − 1)."""
    return (column[:, None] == np.unique(column)[1:]).astype(float)
