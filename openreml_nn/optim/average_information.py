"""A second-order optimiser for a few parameters and an objective that is a negative log-likelihood.

It is a ``torch.optim.Optimizer`` driven by a closure, as ``torch.optim.LBFGS`` is, and differs from it in what a
likelihood offers: an information matrix at hardly any cost, a scale on which convergence can be told (the Newton
decrement g'H⁻¹g, twice the gain in ℓ that is left), and variances that go to zero.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openreml_nn.optim.boundaries import AT, Leap, Place, leaps
from openreml_nn.optim.cone import to_the_best
from openreml_nn.optim.controls import StepControl, TrustRegion, newton_step
from openreml_nn.optim.curvature import among, condition, confounded, embedded, newton_decrement, norm, null_directions
from openreml_nn.optim.geometry import Geometry
from openreml_nn.optim.points import Point, Points
from openreml_nn.optim.progress import Progress
from openreml_nn.optim.secant import predicts_better, updated
from openreml_nn.optim.triangular import boundary_in_words, left_out, turns_only

ROUNDING = 1e-12  # relative error of ℓ below which a gain cannot be seen
ENOUGH = 1e-6  # Newton decrement at which a fit has converged that cannot gain any more
NEAR = 1e-4  # share of the Newton decrement that a step leaves where what it taught is used in the next one
FAR = 6.0  # raw way from the start at which parameters that cannot be told apart have run off together


_ARRAYS = {
    "theta": float, "origin": float, "score": float, "information": float, "secant": float, "units": float,
    "held": int, "finite": bool, "mirrors": bool, "cells": int,
}  # fmt: skip


def _undecorated(name: str) -> Any:
    """A method of torch's optimisers without what torch's compiler has put around it, whose import takes a second."""
    method = getattr(torch.optim.Optimizer, name)
    return getattr(method, "__wrapped__", method)


class ConfoundedParameters(ValueError):
    """The information is singular: the data cannot tell some parameters apart."""


class AverageInformation(torch.optim.Optimizer):
    r"""θ ← θ + δ, with δ from the score and an information matrix of the objective, under a step control.

    Every accepted step raises ℓ; where the expected gain is below the rounding of ℓ, the Newton decrement falls instead
    and ℓ stays the same to rounding. A trial point at which V is not positive definite is a rejected step. A parameter
    that runs to a finite boundary of its natural scale (a variance to 0, a correlation to 1) is held there as soon as
    what is left to gain is nothing, and let go again when the score points inwards.

    Args:
        params: Parameters, each of any shape; those with ``requires_grad`` are moved.
        information: Gives the (k, k) information at the thetas of the closure's last call.
        geometry: What is known of the k parameters, or a function that gives it at their present values.
        control: Step control.
        tolerance: Newton decrement at which the fit has converged.

    Raises:
        ConfoundedParameters: from ``step``, when the information stays singular.

    Source: Gilmour, Thompson & Cullis (1995), Biometrics 51, 1440-1450.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        information: Callable[[], Tensor],
        *,
        geometry: Geometry | Callable[[], Geometry] | None = None,
        control: StepControl | None = None,
        tolerance: float = 1e-11,
    ) -> None:
        super().__init__(params, {})
        if len(self.param_groups) != 1:
            raise ValueError("`AverageInformation` needs all its parameters in one group.")
        if not tolerance > 0:
            raise ValueError(f"`AverageInformation` needs a tolerance above 0, got {tolerance}.")
        self._points = Points(self.param_groups, information, geometry)
        self.control = control or TrustRegion()
        self.tolerance = tolerance

    add_param_group = _undecorated("add_param_group")
    zero_grad = _undecorated("zero_grad")

    # ---- what a caller reads -----------------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """Where the optimiser stands; an error before the first step."""
        s = self._memory()
        if "loss" not in s:
            raise ValueError("`AverageInformation` has made no step yet.")
        free = s["held"] == 0
        g, H = s["score"][free], among(s["information"], free)
        return Progress(
            iteration=s["iteration"], loglik=-s["loss"], score_norm=norm(g),
            decrement=s["decrement"], condition=condition(H),
            step_norm=s["step_norm"], step_length=s["step_length"], trials=s["trials"],
            held=tuple(int(h) for h in s["held"]),
            done=s["done"], converged=s["converged"], reason=s["reason"],
        )  # fmt: skip

    @property
    def information(self) -> np.ndarray:
        """The information at the present thetas, shape (k, k)."""
        return np.array(self._memory()["information"])

    # ---- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one accepted step, or end; returns the loss at the thetas it leaves.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss.
        """
        s = self._memory()
        if "theta" not in s or self._points.were_moved(s["theta"]):
            self._begin(s, closure)
        elif s["done"]:
            with torch.enable_grad():
                closure()  # a training loop expects its closure to be called
        if not s["done"]:
            self._advance(s, closure)
        self._points.remember()
        return torch.tensor(s["loss"], dtype=torch.float64)

    def _begin(self, s: dict[str, Any], closure: Callable[[], Any]) -> None:
        """Evaluate where the parameters are, without moving."""
        k = self._points.count
        if k == 0:
            raise ValueError("`AverageInformation` has no parameter to move; all are fixed.")
        geometry = self._points.geometry()
        at = self._points.at_present(closure, geometry.units)
        if not np.isfinite(at.loss):
            raise ValueError(f"The objective is {at.loss} at the start values; give others.")
        if all(p.grad is None for p in self._points.moved):
            raise ValueError("The closure left no gradient in any parameter: it must call `backward` on its loss.")
        s.update(
            vars(at), origin=at.theta,
            held=np.zeros(k, dtype=int), radius=self.control.first_radius,
            finite=np.stack([geometry.finite_below, geometry.finite_above]), mirrors=geometry.mirrors,
            cells=geometry.cells, names=geometry.names, secant=np.zeros((k, k)), use_secant=False,
            iteration=0, step_norm=0.0, step_length=0.0, trials=1,
            done=False, converged=False, reason="",
        )  # fmt: skip
        self._judge(s)

    def _advance(self, s: dict[str, Any], closure: Callable[[], Any]) -> None:
        """Try steps until one is accepted, or none is left to try."""
        units, free = s["units"], s["held"] == 0
        g, H = s["score"] * units, self._curvature(s, s["use_secant"]) * np.outer(units, units)
        full = embedded(newton_step(among(H, free), g[free]), free)
        candidates = leaps(self._place(s), full)
        if s["radius"] < self.control.first_radius and s["mirrors"].any():  # a step along a factor may have failed
            place = s["cells"], s["theta"], s["score"], s["information"], s["held"], units
            candidates[:0] = to_the_best(*place, self._trial(s, g, H, None)[1])
        rounding, trials = ROUNDING * max(1.0, abs(s["loss"])), 0
        same_units = units if s["finite"].any(axis=0).all() else None  # those of parameters with an end are 1
        while True:
            leap = candidates.pop(0) if candidates else None
            step, promised = self._trial(s, g, H, leap)
            length, trials = norm(step), trials + 1
            self._points.write((s["theta"] + step * units) * (1.0 if leap is None else leap.signs))
            at = self._points.trial(closure, same_units, s["loss"] + rounding)
            seen = promised > rounding
            if at is not None and self._is_better(s, at, seen, rounding):
                break
            if leap is None and s["use_secant"] and seen:
                s.update(secant=np.zeros_like(s["secant"]), use_secant=False)
                H = self._curvature(s, False) * np.outer(units, units)
                full = embedded(newton_step(among(H, free), g[free]), free)
            elif leap is None:
                radius = self.control.after_rejection(s["radius"], length)
                if radius is None or not seen or trials > 60:
                    self._stop_without_step(s, seen)
                    return
                s["radius"] = radius
        gain = s["loss"] - at.loss
        if leap is None:
            s["radius"] = self.control.after_acceptance(s["radius"], length, gain / promised if promised > 0 else 1.0)
        else:
            s["held"] = np.where(leap.step != 0.0, 0, s["held"])
        self._learn(s, step * units if leap is None else None, at, gain)
        s.update(
            vars(at), iteration=s["iteration"] + 1, step_norm=length, trials=trials,
            step_length=length / norm(full) if full.any() else 0.0,
        )  # fmt: skip
        self._judge(s)

    def _is_better(self, s: dict[str, Any], at: Point, seen: bool, rounding: float) -> bool:
        """Whether ℓ is higher at a trial point; where a gain could not be ``seen``, whether the decrement is lower."""
        gain = s["loss"] - at.loss
        if seen or gain <= -rounding or not at.theta.size:
            return seen and gain > 0
        return self._decrement(s, vars(at)) < s["decrement"]

    def _learn(self, s: dict[str, Any], step: np.ndarray | None, at: Point, gain: float) -> None:
        """Learn from an accepted step what the information leaves out; a leap (None) tells nothing of the curvature."""
        S = s["secant"]
        if step is None:
            s.update(secant=np.zeros_like(S), use_secant=False)
            return
        before, after = self._known(s, s), self._known(s, vars(at))
        if S.any():
            use = predicts_better(S, before, s["score"], step, gain)
        else:
            use = self._decrement(s, vars(at)) < NEAR * s["decrement"]
        s.update(secant=updated(S, 0.5 * (before + after), step, s["score"] - at.score), use_secant=use)

    def _known(self, s: dict[str, Any], at: dict[str, Any]) -> np.ndarray:
        """Information at a point, the present one or another, and what a triangular factor adds to it."""
        return at["information"] + left_out(s["cells"], at["theta"], at["score"], s["held"])

    def _decrement(self, s: dict[str, Any], at: dict[str, Any]) -> float:
        """The decrement there, with the parameters that are held now."""
        free = s["held"] == 0
        return newton_decrement(among(self._known(s, at), free), at["score"][free])

    def _curvature(self, s: dict[str, Any], use_secant: bool) -> np.ndarray:
        """What is known at the present point, and what was learnt."""
        return self._known(s, s) + s["secant"] if use_secant else self._known(s, s)

    def _trial(self, s: dict[str, Any], g: np.ndarray, H: np.ndarray, leap: Leap | None) -> tuple[np.ndarray, float]:
        """A step in units of the parameters, and the gain in ℓ that the model promises for it."""
        leap = leap or Leap(np.zeros(len(g)), np.ones(len(g)), 0.0)
        if leap.alone:
            return leap.step, leap.promised
        free = (s["held"] == 0) & (leap.step == 0)
        known, own = np.zeros(len(g)) + leap.linear, np.zeros(len(g))
        if free.any():
            own[free] = self.control.step(among(H, free), (g - H @ known)[free], s["radius"])
        known += own
        return own + leap.step, leap.promised + float(g @ known - 0.5 * known @ H @ known)

    # ---- boundaries and the end --------------------------------------------------------------------------------------

    def _place(self, s: dict[str, Any]) -> Place:
        units, theta = s["units"], s["theta"]
        return Place(
            g=s["score"] * units, d=s["information"].diagonal() * units**2,
            theta=theta, moved=theta - s["origin"], held=s["held"],
            finite=s["finite"], mirrors=s["mirrors"] & (np.abs(theta) > 1e-6 * units),
        )  # fmt: skip

    def _judge(self, s: dict[str, Any]) -> None:
        """Hold and release parameters, and end where nothing is left to gain."""
        place = self._place(s)
        at, _ = place.flat(AT)
        at[s["mirrors"].any(axis=0)] = 0.0  # an entry below a pivot of zero runs nowhere: its column only turns
        s["held"] = np.where(place.inwards(), 0, np.where(at != 0, at, s["held"])).astype(int)
        s["decrement"] = self._decrement(s, s)
        if s["decrement"] <= self.tolerance:
            self._end(s, "the score is zero")

    def _stop_without_step(self, s: dict[str, Any], seen: bool) -> None:
        """End, back at the last accepted thetas."""
        self._points.write(s["theta"], -s["score"])
        free = s["held"] == 0
        left = min(newton_decrement(among(self._curvature(s, use), free), s["score"][free]) for use in (False, True))
        if left < ENOUGH:
            self._end(s, "no gain above rounding is left")
        else:
            s.update(done=True, converged=False, reason=f"no step raises the likelihood (Newton decrement {left:.2g})")

    def _end(self, s: dict[str, Any], reason: str) -> None:
        free = s["held"] == 0
        H = among(s["information"], free)
        unclear = confounded(H)
        which = np.flatnonzero(free)[unclear]
        if turns_only(s["cells"][:, which], s["theta"][which], null_directions(H)[unclear]):
            unclear = unclear[:0]
        names, (below, above) = np.array(s["names"]), s["finite"]
        runs_off = ((s["held"] < 0) & ~below) | ((s["held"] > 0) & ~above)
        if len(unclear) and (np.abs(self._place(s).moved[free][unclear]) > FAR).all():
            runs_off[np.flatnonzero(free)[unclear]] = True
        elif len(unclear):
            raise ConfoundedParameters(
                f"The data cannot tell these parameters apart: {', '.join(names[free][unclear])}. Their average "
                f"information is singular. Remove one of the terms, or fix one of the parameters."
            )
        if runs_off.any():
            reason = f"no finite maximum: the likelihood still rises where {', '.join(names[runs_off])} has no bound"
        elif (s["held"] != 0).any():
            reason = f"{reason}, on the boundary {boundary_in_words(s['names'], s['cells'], s['held'] != 0)}"
        s.update(done=True, converged=not runs_off.any(), reason=reason)

    # ---- checkpoints: plain tensors on the way out, arrays on the way in ---------------------------------------------

    def _memory(self) -> dict[str, Any]:
        return self.state[self.param_groups[0]["params"][0]]

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        saved["state"] = {
            i: {key: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
                for key, value in memory.items()}
            for i, memory in saved["state"].items()
        }  # fmt: skip
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for memory, given in zip(self.state.values(), state_dict["state"].values(), strict=True):
            for key, kind in _ARRAYS.items():
                if key in memory:
                    memory[key] = memory[key].detach().cpu().numpy().astype(kind)
            if "score" in memory and "decrement" not in memory:  # of a checkpoint that was written before it was kept
                memory["decrement"] = self._decrement(memory, memory)
            # torch rebuilds whatever can be iterated element by element, which makes nonsense of a text
            memory.update({key: value for key, value in given.items() if isinstance(value, (str, list))})
