"""Tables, kernels, terms, and the model that they make (an index)."""

from openreml_nn.data.kernels import Kernel
from openreml_nn.data.model import MixedModel, NewRows
from openreml_nn.data.tables import bundled_tables, read_table, table_path
from openreml_nn.data.terms import Structure, Term, TermLike

__all__ = [
    "Kernel",
    "MixedModel",
    "NewRows",
    "Structure",
    "Term",
    "TermLike",
    "bundled_tables",
    "read_table",
    "table_path",
]
