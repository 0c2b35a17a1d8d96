"""The simulated tables: y = f(x) + Σ z'b + ε with f(x) = s cos s + 2 x₀x₁, s = 1 + Σx, and x uniform on (−1, 1)¹⁰."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance import Levels, Matrix, ScalarMatrix, UnstructuredMatrix
from openreml_nn.nn import Effects, MixedModelHead

TEST, VALIDATION = 0.2, 0.1  # share of all rows, and of the rows that are not test rows
POWERS = ["1", "t", "t^2"]


class Rows(NamedTuple):
    """Rows of a table.

    Attributes:
        x: Features, shape (n, k), float32.
        y: Response, shape (n,), float64.
        f: Its mean without random effects, shape (n,), float64; zeros where it is not known.
        groups: For each factor its codes, shape (n,), or (codes, design).
    """

    x: Tensor
    y: Tensor
    f: Tensor
    groups: dict[str, Tensor | tuple[Tensor, Tensor]]

    def __getitems__(self, index: list[int]) -> "Rows":  # what a DataLoader asks for a batch
        return self.take(torch.tensor(index))

    def take(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        groups = {name: tuple(part[index] for part in given) if isinstance(given, tuple) else given[index]
                  for name, given in self.groups.items()}  # fmt: skip
        return Rows(self.x[index], self.y[index], self.f[index], groups)

    @property
    def codes(self) -> list[Tensor]:
        """The codes of each factor."""
        return [given[0] if isinstance(given, tuple) else given for given in self.groups.values()]


class Setting(NamedTuple):
    """What is simulated.

    Attributes:
        levels: Number of levels of each factor.
        sigma2: Variance of each factor; with ``time`` those of intercept, slope and quadratic term.
        crossed: Whether the second factor is independent of the first. The authors' program writes the levels of every
            factor in order, so that each level of one meets two or three of the other.
        time: None; ``"longest"``: t counts a subject's rows and is 1 at the end of the longest subject (the authors'
            program); ``"own"``: 1 at the end of each subject.
        rho: Correlation of intercept with slope and with quadratic term.
    """

    levels: tuple[int, ...]
    sigma2: tuple[float, ...]
    crossed: bool = False
    time: str | None = None
    rho: float = 0.3

    def __str__(self) -> str:
        kind = f" crossed={self.crossed}" * (len(self.levels) > 1) + f" t={self.time}" * (self.time is not None)
        return f"q={'+'.join(map(str, self.levels))} sigma2={'+'.join(f'{v:g}' for v in self.sigma2)}{kind}"

    def effects(self, truth: bool = False) -> dict[str, Effects]:
        """The random effects of the model, at start values of 1 or at the values that were simulated."""
        if self.time is not None:
            G = UnstructuredMatrix(Levels(POWERS), start=self.covariance() if truth else torch.eye(3))
            return {"subject": Effects(self.levels[0], POWERS, G)}
        variances: list[Matrix] = [ScalarMatrix(q, start=v if truth else 1.0)
                                   for q, v in zip(self.levels, self.sigma2, strict=True)]  # fmt: skip
        return {f"z{i}": Effects(G.shape[0], covariance=G) for i, G in enumerate(variances)}

    def covariance(self) -> Tensor:
        """Covariance of the effects of a subject, shape (3, 3)."""
        R = torch.eye(3, dtype=torch.float64)
        R[0, 1:] = R[1:, 0] = self.rho
        sd = torch.tensor(self.sigma2, dtype=torch.float64).sqrt()
        return R * sd[:, None] * sd


def simulate(setting: Setting, rows: int, seed: int) -> tuple[Rows, Rows, Rows]:
    """Rows for training, for validation and for the test, drawn at random."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.0, 1.0, (rows, 10))
    s = 1.0 + x.sum(1)
    f = s * np.cos(s) + 2.0 * x[:, 0] * x[:, 1]
    codes = [_sorted_codes(rng, rows, q) for q in setting.levels]
    if setting.crossed:
        codes[1:] = [rng.permutation(code) for code in codes[1:]]
    if setting.time is None:
        groups: dict = {f"z{i}": torch.from_numpy(code) for i, code in enumerate(codes)}
        Zb = sum(rng.normal(0.0, math.sqrt(v), q)[code]
                 for q, v, code in zip(setting.levels, setting.sigma2, codes, strict=True))  # fmt: skip
    else:
        t = _time(codes[0], own=setting.time == "own")
        f, x = f + t + t**2, np.column_stack([x, t])
        design = np.stack([np.ones(rows), t, t**2], axis=1)
        b = rng.multivariate_normal(np.zeros(3), setting.covariance().numpy(), setting.levels[0])
        groups = {"subject": (torch.from_numpy(codes[0]), torch.from_numpy(design))}
        Zb = (design * b[codes[0]]).sum(1)
    y = f + Zb + rng.standard_normal(rows)
    table = Rows(torch.from_numpy(x).float(), torch.from_numpy(y), torch.from_numpy(f), groups)
    order = torch.from_numpy(rng.permutation(rows))
    test = round(TEST * rows)
    validation = test + round(VALIDATION * (rows - test))
    return table.take(order[validation:]), table.take(order[test:validation]), table.take(order[:test])


def join(first: Rows, second: Rows) -> Rows:
    """The rows of both."""
    groups = {}
    for name, a in first.groups.items():
        b = second.groups[name]
        groups[name] = tuple(map(torch.cat, zip(a, b, strict=True))) if isinstance(a, tuple) else torch.cat([a, b])
    return Rows(*(torch.cat([getattr(first, k), getattr(second, k)]) for k in ("x", "y", "f")), groups)


def floor(setting: Setting, known: Rows, test: Rows, refit: bool) -> tuple[float, dict[str, float]]:
    """What nobody can beat: f is known.

    Returns:
        Test error of the best linear unbiased prediction with the true variances, and the REML estimates of the
        variances if ``refit``.
    """
    head = MixedModelHead(setting.effects(truth=True))
    head.condition(known.f, known.y, known.groups, variances=False)
    mse = (head.predict(test.f, test.groups, variances=False)[0] - test.y).square().mean().item()
    if not refit:
        return mse, {}
    head.refit(known.f, known.y, known.groups, variances=False)
    return mse, head.variance()


def _sorted_codes(rng: np.random.Generator, rows: int, q: int) -> np.ndarray:
    """Levels of all rows in order, their sizes multinomial with weights 1 + Poisson(3)."""
    weights = rng.poisson(3.0, q) + 1
    return np.repeat(np.arange(q), rng.multinomial(rows, weights / weights.sum()))


def _time(subject: np.ndarray, own: bool) -> np.ndarray:
    """The rows of each subject counted from 0 and scaled to end at 1."""
    sizes = np.bincount(subject)
    count = np.arange(len(subject)) - np.repeat(sizes.cumsum() - sizes, sizes)
    last = np.repeat(sizes, sizes) if own else sizes.max()
    return count / np.maximum(last - 1, 1)
