"""Modules: parameters and one functional call each."""

from dorac.nn.conv import DoraConv1d, DoraConv2d, DoraConv3d
from dorac.nn.embedding import DoraEmbedding
from dorac.nn.experts import DoraExperts
from dorac.nn.kinds import layer_class, unwrappable
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear
from dorac.nn.pool import AdapterPool
from dorac.nn.quantised import DoraQuantLinear

__all__ = [
    "AdapterPool",
    "DoraConv1d",
    "DoraConv2d",
    "DoraConv3d",
    "DoraEmbedding",
    "DoraExperts",
    "DoraLayer",
    "DoraLinear",
    "DoraQuantLinear",
    "layer_class",
    "unwrappable",
]
