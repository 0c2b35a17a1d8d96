"""Solvers: V → a prepared problem → an evaluation (an index)."""

from openreml_nn.solvers.auto import SOLVERS, Choice, choose_shared, choose_solver
from openreml_nn.solvers.base import Evaluation, NotPositiveDefinite, Problem, Solver
from openreml_nn.solvers.dense import DenseSolver
from openreml_nn.solvers.fixed_effects import FixedEffects, prepare_fixed_effects
from openreml_nn.solvers.ranks import ALONE, ProcessGroup, Ranks, processes
from openreml_nn.solvers.reductions import reduce_factor, reduce_kernel
from openreml_nn.solvers.terms import RandomTerm, random_terms

__all__ = [
    "ALONE",
    "SOLVERS",
    "Choice",
    "DenseSolver",
    "Evaluation",
    "FixedEffects",
    "NotPositiveDefinite",
    "Problem",
    "ProcessGroup",
    "RandomTerm",
    "Ranks",
    "Solver",
    "choose_shared",
    "choose_solver",
    "prepare_fixed_effects",
    "processes",
    "random_terms",
    "reduce_factor",
    "reduce_kernel",
]
