"""Optimisation of likelihoods: the optimiser, its directions and step controls, start values (an index)."""

from openreml_nn.optim.average_information import AverageInformation, ConfoundedParameters
from openreml_nn.optim.controls import FixedStep, Halving, StepControl, TrustRegion
from openreml_nn.optim.curvature import newton_decrement
from openreml_nn.optim.directions import Average, Direction, Fisher, Observed
from openreml_nn.optim.geometry import Geometry
from openreml_nn.optim.progress import Progress
from openreml_nn.optim.start import data_start, require_estimable

__all__ = [
    "Average",
    "AverageInformation",
    "ConfoundedParameters",
    "Direction",
    "Fisher",
    "FixedStep",
    "Geometry",
    "Halving",
    "Observed",
    "Progress",
    "StepControl",
    "TrustRegion",
    "data_start",
    "newton_decrement",
    "require_estimable",
]
