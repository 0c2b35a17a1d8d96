"""Structures: matrices that own their parameters, one formula each (an index)."""

from openreml_nn.covariance.structures.ar1 import AR1Matrix
from openreml_nn.covariance.structures.cells import CellMatrix
from openreml_nn.covariance.structures.diagonals import (
    DiagonalMatrix,
    DiagonalStructure,
    IdentityMatrix,
    ScalarMatrix,
)
from openreml_nn.covariance.structures.dummy import DummyMatrix
from openreml_nn.covariance.structures.equal import CompoundSymmetricMatrix, EqualEntryMatrix, EquicorrelationMatrix
from openreml_nn.covariance.structures.factor_analytic import FactorAnalyticMatrix
from openreml_nn.covariance.structures.incidence import IncidenceMatrix
from openreml_nn.covariance.structures.khatri_rao import KhatriRaoMatrix
from openreml_nn.covariance.structures.known import KnownMatrix
from openreml_nn.covariance.structures.neural import NeuralMatrix
from openreml_nn.covariance.structures.simple import SimpleMatrix
from openreml_nn.covariance.structures.spatial import DistanceMatrix, ExponentialMatrix, GaussianMatrix
from openreml_nn.covariance.structures.triangular import LowerTriangularMatrix, UnconstrainedMatrix
from openreml_nn.covariance.structures.unstructured import UnstructuredMatrix

__all__ = [
    "AR1Matrix",
    "CellMatrix",
    "CompoundSymmetricMatrix",
    "DiagonalMatrix",
    "DiagonalStructure",
    "DistanceMatrix",
    "DummyMatrix",
    "EqualEntryMatrix",
    "EquicorrelationMatrix",
    "ExponentialMatrix",
    "FactorAnalyticMatrix",
    "GaussianMatrix",
    "IdentityMatrix",
    "IncidenceMatrix",
    "KhatriRaoMatrix",
    "KnownMatrix",
    "LowerTriangularMatrix",
    "NeuralMatrix",
    "ScalarMatrix",
    "SimpleMatrix",
    "UnconstrainedMatrix",
    "UnstructuredMatrix",
]
