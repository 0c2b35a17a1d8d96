"""Directions: which information matrix a step is taken with."""

from abc import ABC, abstractmethod

from torch import Tensor

from openreml_nn.likelihood import average_information, fisher_information, observed_information
from openreml_nn.objectives import Objective
from openreml_nn.solvers import Evaluation


class Direction(ABC):
    """An information matrix of the free raw thetas at an evaluated θ.

    Attributes:
        second_derivatives: Whether it differentiates the likelihood twice, which the dense solver and the blocks allow.
    """

    second_derivatives = False

    @abstractmethod
    def information(self, objective: Objective, evaluation: Evaluation) -> Tensor:
        """Shape (k, k)."""


class Average(Direction):
    """Average information: no trace, one solve; the default."""

    def information(self, objective: Objective, evaluation: Evaluation) -> Tensor:
        return average_information(evaluation)


class Fisher(Direction):
    """Expected information: Fisher scoring. Forms one n × n matrix for each parameter."""

    def information(self, objective: Objective, evaluation: Evaluation) -> Tensor:
        return fisher_information(evaluation)


class Observed(Direction):
    """Observed information: Newton's method. Several factorisations for each parameter."""

    second_derivatives = True

    def information(self, objective: Objective, evaluation: Evaluation) -> Tensor:
        return observed_information(evaluation, objective.loglik)
