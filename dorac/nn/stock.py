"""Which layers can be adapted at all: stock ones, over weights that are what they look like."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dorac import offload
from dorac.dense import not_dense
from dorac.numerics import FLOAT_DTYPES
from dorac.ops import sharded

MIXED = (
    "{} is adapted by dorac already: adapt a model either with dorac.apply_dora or through PEFT, or call "
    "dorac.merge(model, unload=True) first"
)


def not_stock(module: nn.Module, stock: type[nn.Module], weights: Sequence[str] = ("weight",)) -> str | None:
    """Why an adapted layer cannot stand for ``module`` and its weights although it is a ``stock``; None if it can."""
    kind = type(module).__name__
    bias = getattr(module, "bias", None)
    for name in (*weights, "bias") if isinstance(bias, Tensor) else weights:
        tensor = getattr(module, name)
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            return f"{kind} is lazy and has no {name} yet: run one batch first"
        if reason := not_dense(tensor):
            return f"the {name} of {kind} {reason}"
        if tensor.dtype not in FLOAT_DTYPES:
            return f"{kind} has a {name} of {tensor.dtype}, dequantise it first"
        if sharded.any_sharded(tensor):
            return f"the {name} of {kind} is sharded (a DTensor): wrap first, then shard"
        if parametrize.is_parametrized(module, name):
            return (
                f"the {name} of {kind} is parametrised (torch.nn.utils.parametrize): take that off first "
                "(remove_parametrizations), or parametrise the base layer of the adapted one afterwards"
            )
        if module._forward_pre_hooks and name in vars(module):
            return (
                f"the {name} of {kind} is computed by a hook (pruning, weight or spectral norm): take that off first "
                "(prune.remove, remove_weight_norm, remove_spectral_norm)"
            )
    if type(module).forward is not stock.forward or offload.has_own_forward(module):
        return f"{kind} has a forward of its own, which the adapted layer would not run"
    for name in ("__call__", "_call_impl"):
        if getattr(type(module), name) is not getattr(stock, name):
            return f"{kind} has a {name} of its own, which the adapted layer would not run"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{kind} has hooks, which the adapted layer would not run: put them on the adapted layer afterwards"
    return None
