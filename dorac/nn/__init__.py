"""Modules: parameters and one functional call each."""

from dorac.nn.embedding import DoraEmbedding
from dorac.nn.kinds import layer_class, unwrappable
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear

__all__ = ["DoraEmbedding", "DoraLayer", "DoraLinear", "layer_class", "unwrappable"]
