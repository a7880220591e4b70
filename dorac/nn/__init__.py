"""Modules: parameters and one functional call each. ``KINDS`` are all of them, and say which one a module gets."""

from torch import nn

from dorac.nn.conv import DoraConv1d, DoraConv2d, DoraConv3d
from dorac.nn.embedding import DoraEmbedding
from dorac.nn.experts import DoraExperts
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear
from dorac.nn.pool import AdapterPool
from dorac.nn.quantised import DoraQuantLinear

# The first that adapts a module is taken: most quantised layers are an nn.Linear, too.
KINDS = (DoraQuantLinear, DoraLinear, DoraEmbedding, DoraExperts, DoraConv1d, DoraConv2d, DoraConv3d)

__all__ = [
    "KINDS",
    "AdapterPool",
    "DoraConv1d",
    "DoraConv2d",
    "DoraConv3d",
    "DoraEmbedding",
    "DoraExperts",
    "DoraLayer",
    "DoraLinear",
    "DoraQuantLinear",
    "is_linear",
    "layer_class",
    "unwrappable",
]


def layer_class(module: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts modules of this kind, or None. It may still refuse this one: :func:`unwrappable`."""
    return next((kind for kind in KINDS if kind.adapts(module)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a linear layer adapts modules of this kind."""
    return any(kind.adapts(module) for kind in KINDS if issubclass(kind, DoraLinear))


def unwrappable(module: nn.Module) -> str | None:
    """Why no adapted layer can be put in place of ``module``, or None if one can."""
    kind = layer_class(module)
    if kind is None:
        return (
            f"{type(module).__name__} is not supported, only nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, "
            "nn.Conv3d, quantised linear layers and transformers' Conv1D and experts are"
        )
    return kind.unwrappable(module)
