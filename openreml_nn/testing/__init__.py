"""Checks for tests, of this package's structures and of a user's own (an index)."""

from openreml_nn.testing.case import LawBroken
from openreml_nn.testing.check import check_matrix

__all__ = ["LawBroken", "check_matrix"]
