"""Random effects as a layer: b ~ N(0, G(θ)) at any place of a network and under any loss, by variational inference."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.nn.effects import Effects, Entry
from openreml_nn.nn.prior import Prior, cholesky
from openreml_nn.nn.variational import POSTERIORS


class RandomEffect(nn.Module):
    r"""z'b of each row, b ~ N(0, G(θ)), with a Gaussian posterior q(b) = N(m, S) that is trained with the network.

    The loss to minimise is the negative evidence lower bound (ELBO)

    .. math:: −Σ_i E_q \log p(y_i | x_i, b) + KL(q(b) \| N(0, G(θ))),

    for a batch of a mean loss and N rows in all: ``loss + layer.kl() / N``. The layer gives a draw of z'b in training,
    so that the expectation is that over the draws, and the posterior mean z'm otherwise; with a loss whose expectation
    is known (Gaussian, Poisson with a log link), ``moments`` gives what it needs without draws. One optimiser trains
    network, m, S and θ together. The bound is exact for a Gaussian response and ``posterior="full"``; m is then the
    BLUP and S its prediction error covariance.

    ================ ================================== ===========================================
    ``posterior``    S                                  numbers
    ================ ================================== ===========================================
    ``"mean_field"`` diagonal                           2 q s
    ``"block"``      correlated effects within a level  q s (s + 3) / 2
    ``"full"``       all effects correlated             (q s)² / 2: for some thousand effects
    ================ ================================== ===========================================

    The means m and the bias of a network stand for the same thing, and with large counts, or many rows a level, they
    part slowly: then give the bias their common part after each epoch, ``bias += layer.centre()`` without gradients.

    A restricted S understates the uncertainty of crossed factors and of their variances. The divergence costs q s³ for
    independent levels, and for a kernel over levels q² with fixed entries, q³ with parameters. The posterior has the
    default dtype of torch, as other layers; θ and the divergence are float64.

    Args:
        effects: Levels, effects of a level, and G.
        posterior: ``"mean_field"``, ``"block"`` or ``"full"``; it starts at mean zero.
        scale: Standard deviations that it starts from, in those of the prior: 1 for few rows a level, where smaller
            ones would draw the variances of the prior to zero, and 0.1 for many rows or large counts.

    Raises:
        TypeError: ``effects`` is not `Effects`.
        ValueError: There is no such posterior, ``scale`` is not positive, or a variance of G is zero.
        NotPositiveDefinite: G has a singular kernel.
        MemoryError: A full posterior, or the precision of a kernel, does not fit.

    Example:
        >>> import torch
        >>> from openreml_nn.nn import Effects, RandomEffect
        >>> sites = RandomEffect(Effects(["north", "south"]))
        >>> codes = sites.effects.encode(["south", "west", "north"])
        >>> sites(codes, sample=False).tolist()
        [0.0, 0.0, 0.0]
        >>> loss = torch.nn.functional.softplus(sites(codes)).mean() + sites.kl() / 3

    Source: Kingma & Welling (2014), ICLR; local draws: Kingma, Salimans & Welling (2015), NeurIPS 28, 2575-2583.
    """

    def __init__(self, effects: Effects, posterior: str = "mean_field", scale: float = 1.0) -> None:
        super().__init__()
        if not isinstance(effects, Effects):
            raise TypeError(f"`RandomEffect` needs `Effects`, got {type(effects).__name__}.")
        if posterior not in POSTERIORS:
            raise ValueError(
                f"`RandomEffect` has the posteriors {', '.join(map(repr, POSTERIORS))}, got {posterior!r}."
            )
        if not scale > 0:
            raise ValueError(f"`RandomEffect` needs a `scale` greater than 0, got {scale}.")
        self.effects = effects
        self.prior = Prior(effects.G, effects.num_levels)
        variances = effects.G.diagonal(effects.G.theta.detach())
        if not bool((variances > 0).all()):
            raise ValueError(
                "`RandomEffect` starts its posterior at the variances of the prior, and a variance of G is zero. Start "
                "it at a positive value."
            )
        start = scale * variances.sqrt().reshape(effects.num_effects, effects.num_levels).mT
        self.posterior = POSTERIORS[posterior](start.contiguous().to(torch.get_default_dtype()))

    # ---- rows --------------------------------------------------------------------------------------------------------

    def forward(
        self, codes: Entry, design: Tensor | None = None, *, sample: bool | None = None, shared: bool = False
    ) -> Tensor:
        """z'b of each row, shape (m,).

        A level that is not in the vocabulary (code −1) has mean 0, and is drawn from the prior of an average level.

        Args:
            codes: Level of each row, shape (m,), integers from −1; or (codes, design), as a head takes them.
            design: Values of the effects, shape (m, s), through which gradients flow; ones for one effect.
            sample: Draw b from the posterior rather than take its mean; as `torch.nn.Dropout`, in training when left
                out.
            shared: Rows of one level get the same draw of b, for a loss that joins rows. A loss that adds up over rows
                has the same expectation with a draw for each row, and gradients of less variance.
        """
        codes, design, unknown = self._checked(codes, design)
        if not self._drawn(sample):
            return self._mean(codes, design)
        if shared:
            b = self._draw(codes, shared, unknown)
            return b[:, 0] if design is None else (design * b).sum(1)
        mean = self._mean(codes, design)
        return mean + self._deviation(codes, design, unknown) * torch.randn_like(mean)

    def effects_of(self, codes: Tensor, *, sample: bool | None = None, shared: bool = False) -> Tensor:
        """The s effects b of the level of each row, shape (m, s), as for the channels of a feature map.

        Args:
            codes: Level of each row, shape (m,), integers from −1.
            sample: As of a call of the layer.
            shared: As of a call of the layer.
        """
        ones = self.posterior.mean.new_ones(len(codes), self.effects.num_effects)
        codes, _, unknown = self._checked(codes, ones)
        if self._drawn(sample):
            return self._draw(codes, shared, unknown)
        return torch.where((codes >= 0)[:, None], self.posterior.mean[codes.clamp(min=0)], 0.0)

    def moments(self, codes: Entry, design: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of z'b under the posterior, each of shape (m,); an unknown level has its prior's.

        Arguments are those of a call of the layer.
        """
        codes, design, unknown = self._checked(codes, design)
        return self._mean(codes, design), self._deviation(codes, design, unknown).square()

    # ---- the divergence, and what was learned ------------------------------------------------------------------------

    def kl(self) -> Tensor:
        """KL(q(b) || N(0, G(θ))) of all levels, in closed form, differentiable in m, S and θ.

        Raises:
            NotPositiveDefinite: G has no Cholesky factor.
        """
        return self.posterior.kl(self.prior.precision(self.effects.G))

    @torch.no_grad()
    def centre(self, effect: str | None = None) -> Tensor:
        r"""Take the common part c of the means of an effect out of them, and return it for the bias of the network.

        m becomes m − cD, with D = 1 for this effect of each level and 0 for others. The layer and a bias that is raised
        by c give the same as before, and c = D'G⁻¹m / D'G⁻¹D lowers the divergence most: it is the step to the best
        bias that the gradient finds slowly.

        Args:
            effect: Name of the effect; the first one when left out. Of a slope, c is for the coefficient of its
                variable.

        Returns:
            c, a scalar.

        Raises:
            ValueError: There is no such effect.
            NotPositiveDefinite: G has no Cholesky factor.

        Source: Vines, Gilks & Wild (1996), Statistics and Computing 6, 337-346, who call it sweeping.
        """
        names, mean = self.effects.effects, self.posterior.mean
        if effect is not None and effect not in names:
            raise ValueError(f"`centre` needs one of the effects {names}, got {effect!r}.")
        precision = self.prior.precision(self.effects.G)
        place = 0 if effect is None else names.index(effect)
        D = torch.zeros_like(mean, dtype=precision.logdet_G.dtype)
        D[:, place] = 1.0
        weights = precision.times(D[..., None])[..., 0]
        c = ((weights * mean).sum() / (weights * D).sum()).to(mean.dtype)
        mean[:, place] -= c
        return c

    def variance(self) -> dict[str, float]:
        """Variance parameters of the prior on their natural scale by name: ``sigma^2``."""
        G = self.effects.G
        return dict(zip(G.natural_names, G.natural(G.theta.detach()).tolist(), strict=True))

    def table(self) -> pd.DataFrame:
        """Effect, level, mean and standard deviation of each effect under the posterior."""
        q, names = self.effects.num_levels, self.effects.effects
        with torch.no_grad():
            mean, sd = (x.mT.flatten().cpu().numpy() for x in (self.posterior.mean, self.posterior.deviations()))
        return pd.DataFrame(
            {"effect": np.repeat(names, q), "level": self.effects.level_names * len(names), "mean": mean, "sd": sd}
        )

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _drawn(self, sample: bool | None) -> bool:
        return self.training if sample is None else sample

    def _checked(self, codes: Entry, design: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
        """Codes as int64, the design in the dtype of the posterior, with its gradient, and if levels are unknown."""
        if design is None and isinstance(codes, (tuple, list)) and len(codes) == 2 and isinstance(codes[1], Tensor):
            codes, design = codes
        entry: Any = codes if design is None else (codes, design.detach())
        codes, _, unknown = self.effects.checked(entry, len(codes), type(self).__name__, unknown=True)
        return codes, None if design is None else design.to(self.posterior.mean.dtype), unknown

    def _mean(self, codes: Tensor, design: Tensor | None) -> Tensor:
        b = self.posterior.mean[codes.clamp(min=0)]
        return torch.where(codes >= 0, b[:, 0] if design is None else (design * b).sum(1), 0.0)

    def _deviation(self, codes: Tensor, design: Tensor | None, unknown: bool) -> Tensor:
        """Standard deviation of z'b, shape (m,)."""
        known = self.posterior.deviation(codes.clamp(min=0), design)
        if not unknown:
            return known
        root = self._root_of_prior()
        prior = root[0, 0] if design is None else torch.linalg.vector_norm(design @ root, dim=1)
        return torch.where(codes >= 0, known, prior)

    def _draw(self, codes: Tensor, shared: bool, unknown: bool) -> Tensor:
        """b of each row, shape (m, s)."""
        places = codes.clamp(min=0)
        known = self.posterior.mean[places] + self.posterior.noise(places, shared)
        if not unknown:
            return known
        return torch.where((codes >= 0)[:, None], known, torch.randn_like(known) @ self._root_of_prior().mT)

    def _root_of_prior(self) -> Tensor:
        """Cholesky factor of the prior of an average level, shape (s, s)."""
        return cholesky(self.effects.average_level()).to(self.posterior.mean)
