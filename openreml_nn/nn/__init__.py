"""Mixed-model layers for networks (an index)."""

from openreml_nn.nn.chunks import in_chunks
from openreml_nn.nn.effects import Effects, Entry
from openreml_nn.nn.head import MixedModelHead
from openreml_nn.nn.mlp import MLP
from openreml_nn.nn.random_effect import RandomEffect
from openreml_nn.nn.rows import Rows
from openreml_nn.nn.sampler import ClusterBatchSampler

__all__ = ["MLP", "ClusterBatchSampler", "Effects", "Entry", "MixedModelHead", "RandomEffect", "Rows", "in_chunks"]
