"""Transforms from raw thetas to natural parameters (an index)."""

from openreml_nn.covariance.transform.base import Transform
from openreml_nn.covariance.transform.elementwise import (
    TransformChain,
    TransformExp,
    TransformExp2,
    TransformExp10,
    TransformExpPow2,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)

__all__ = [
    "Transform",
    "TransformChain",
    "TransformExp",
    "TransformExp2",
    "TransformExp10",
    "TransformExpPow2",
    "TransformIdentity",
    "TransformPow",
    "TransformScaleShift",
    "TransformSigmoid",
]
