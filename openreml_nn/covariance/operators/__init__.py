"""Operators on matrices (an index)."""

from openreml_nn.covariance.operators.base import Operator
from openreml_nn.covariance.operators.block_diagonal import BlockDiagonal
from openreml_nn.covariance.operators.covariance_propagation import CovariancePropagation
from openreml_nn.covariance.operators.diagonal_propagation import DiagonalPropagation
from openreml_nn.covariance.operators.products import Gram, HadamardProduct, KroneckerProduct, Product
from openreml_nn.covariance.operators.rearrange import Augment, Inverse, Stack, Transpose
from openreml_nn.covariance.operators.sum import Sum

__all__ = [
    "Augment",
    "BlockDiagonal",
    "CovariancePropagation",
    "DiagonalPropagation",
    "Gram",
    "HadamardProduct",
    "Inverse",
    "KroneckerProduct",
    "Operator",
    "Product",
    "Stack",
    "Sum",
    "Transpose",
]
