"""Whether calling a module runs its own forward and nothing else."""

from torch import nn

from dorac import offload


def unhooked(module: nn.Module) -> bool:
    """Whether nothing but its own forward would run if this module was called, hooks of all modules aside."""
    attributes = module.__dict__
    return not (
        attributes["_forward_pre_hooks"]
        or attributes["_forward_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or ("forward" in attributes and (offload.is_hooked(module) or offload.has_own_forward(module)))
    )
