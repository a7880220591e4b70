"""Which adapted layer a module gets."""

from torch import nn

from dorac.nn.experts import DoraExperts, is_experts
from dorac.nn.layer import DoraLayer
from dorac.nn.linear import DoraLinear, is_conv1d

KINDS = (DoraLinear, DoraExperts)


def layer_class(module: nn.Module) -> type[DoraLayer] | None:
    """The class that adapts modules of this kind, or None. It may still refuse this one: :func:`unwrappable`."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return DoraLinear
    return DoraExperts if is_experts(module) else None


def unwrappable(module: nn.Module) -> str | None:
    """Why no adapted layer can be put in place of ``module``, or None if one can."""
    cls = layer_class(module)
    if cls is None:
        return f"{type(module).__name__} is not supported, only nn.Linear and transformers' Conv1D and experts are"
    return cls.unwrappable(module)
