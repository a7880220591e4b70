"""Which adapted layer a module gets."""

from torch import nn

from dorac.nn.embedding import DoraEmbedding
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear, is_conv1d

KINDS = (DoraLinear, DoraEmbedding)


def layer_class(module: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts modules of this kind, or None. It may still refuse this one: :func:`unwrappable`."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return DoraLinear
    if isinstance(module, nn.Embedding):
        return DoraEmbedding
    return None


def unwrappable(module: nn.Module) -> str | None:
    """Why no adapted layer can be put in place of ``module``, or None if one can."""
    cls = layer_class(module)
    if cls is None:
        return f"{type(module).__name__} is not supported, only nn.Linear, transformers' Conv1D and nn.Embedding are"
    return cls.unwrappable(module)
