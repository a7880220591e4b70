"""Which adapted layer a module gets."""

from torch import nn

from dorac import packed
from dorac.nn.conv import DoraConv1d, DoraConv2d, DoraConv3d
from dorac.nn.embedding import DoraEmbedding
from dorac.nn.experts import DoraExperts, is_experts
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear, is_conv1d
from dorac.nn.quantised import DoraQuantLinear

CONVOLUTIONS = (DoraConv1d, DoraConv2d, DoraConv3d)
KINDS = (DoraLinear, DoraEmbedding, *CONVOLUTIONS, DoraExperts)


def layer_class(module: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts modules of this kind, or None. It may still refuse this one: :func:`unwrappable`."""
    if packed.holder(module) is not None:
        return DoraQuantLinear
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return DoraLinear
    if isinstance(module, nn.Embedding):
        return DoraEmbedding
    if is_experts(module):
        return DoraExperts
    return next((cls for cls in CONVOLUTIONS if isinstance(module, cls.STOCK)), None)


def unwrappable(module: nn.Module) -> str | None:
    """Why no adapted layer can be put in place of ``module``, or None if one can."""
    cls = layer_class(module)
    if cls is None:
        return (
            f"{type(module).__name__} is not supported, only nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, "
            "nn.Conv3d, quantised linear layers and transformers' Conv1D and experts are"
        )
    return cls.unwrappable(module)
