"""Mixed-model layers for networks (an index)."""

from openreml_nn.nn.chunks import in_chunks
from openreml_nn.nn.effects import Effects
from openreml_nn.nn.head import MixedModelHead
from openreml_nn.nn.random_effect import RandomEffect
from openreml_nn.nn.rows import Rows
from openreml_nn.nn.sampler import ClusterBatchSampler

__all__ = ["ClusterBatchSampler", "Effects", "MixedModelHead", "RandomEffect", "Rows", "in_chunks"]
