"""Crossed factors with all rows at once, where a matrix over their levels would be too large."""

import torch
from torch import Tensor


class Backfitting:
    r"""Predicted effects of crossed factors, b_i ~ N(0, σ_i² I), and their variances, at a cost of the number of rows.

    The effects solve the mixed-model equations: those of one factor given all others are sums over the rows of each
    level, r̄_l n_l / (n_l + σ²/σ_i²), and are found in turn. The variances move by a step of Monte Carlo EM: a draw of
    the effects given the data is b̂ + b* − b̂*, with (b*, y*) drawn from the model and b̂* predicted from y* (Matheron's
    rule), and their mean squares are the new variances. Thousands of levels make one draw enough.

    Args:
        codes: Level of each row, shape (n,), for each factor.
        levels: Number of levels of each factor.

    Attributes:
        effects: b̂ of each factor, shape (levels,).
        sigma2: σ_i² of each factor.
        residual: σ².

    Sources: Buja, Hastie & Tibshirani (1989), Annals of Statistics 17, 453-510; Wei & Tanner (1990), JASA 85, 699-704;
    Journel & Huijbregts (1978), Mining Geostatistics.
    """

    def __init__(self, codes: list[Tensor], levels: tuple[int, ...]) -> None:
        self.codes = codes
        self.counts = [torch.bincount(code, minlength=q).double() for code, q in zip(codes, levels, strict=True)]
        self.effects = [torch.zeros_like(count) for count in self.counts]
        self.sigma2, self.residual = [1.0] * len(levels), 1.0

    def update(self, r: Tensor, sweeps: int = 15) -> None:
        """Predict the effects from r = y − f of all rows, beginning with the last ones, and move the variances.

        Args:
            r: Shape (n,), float64.
            sweeps: How often each factor has its turn.
        """
        draws = [torch.randn_like(b) * v**0.5 for b, v in zip(self.effects, self.sigma2, strict=True)]
        drawn = torch.randn_like(r) * self.residual**0.5 + total(draws, self.codes)
        b = [torch.stack([own, torch.zeros_like(own)], dim=1) for own in self.effects]
        both = torch.stack([r, drawn], dim=1)
        for _ in range(sweeps):
            for i, (code, count) in enumerate(zip(self.codes, self.counts, strict=True)):
                left = both - total(b[:i] + b[i + 1 :], self.codes[:i] + self.codes[i + 1 :])
                sums = torch.zeros_like(b[i]).index_add_(0, code, left)
                b[i] = sums / (count + self.residual / self.sigma2[i])[:, None]
        given = [own[:, 0] + draw - own[:, 1] for own, draw in zip(b, draws, strict=True)]
        self.effects = [own[:, 0] for own in b]
        self.sigma2 = [own.square().mean().item() for own in given]
        self.residual = (r - total(given, self.codes)).square().mean().item()


def total(effects: list[Tensor], codes: list[Tensor]) -> Tensor:
    """Σ b_i of each row."""
    return torch.stack([b[code] for b, code in zip(effects, codes, strict=True)]).sum(0)
