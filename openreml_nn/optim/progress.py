"""Where an optimiser stands after a step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where the optimiser stands, after its last step.

    Attributes:
        iteration: Accepted steps so far.
        loglik: ℓ.
        score_norm: Euclidean norm of ∂ℓ/∂θ over the parameters that are not held on a boundary.
        decrement: g'H⁻¹g over the same.
        step_norm: Length of the last accepted step, in units of the parameters.
        step_length: That length as a fraction of the full step H⁻¹g.
        trials: Evaluations that the last step took.
        condition: Condition number of the information.
        held: Held parameters: −1 at a lower, 1 at an upper boundary, 0 free.
        done: Whether the optimiser has ended.
        converged: Whether it ended at a maximum.
        reason: Why it ended.
    """

    iteration: int
    loglik: float
    score_norm: float
    decrement: float
    step_norm: float
    step_length: float
    trials: int
    condition: float
    held: tuple[int, ...]
    done: bool
    converged: bool
    reason: str

    def __str__(self) -> str:
        return f"step {self.iteration:3d}  log-likelihood {self.loglik:.6f}  decrement {self.decrement:.1e}"
