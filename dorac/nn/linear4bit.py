"""bitsandbytes' ``Linear4bit`` in blocks: when it multiplies with its dense weight as a block does, and that is all.

A block makes the same weight dense (:mod:`dorac.ops.packed_product`). On a GPU with kernels an adapted layer by itself
is such a block, too (:func:`alone`): one Function in place of the library's and ours. The layer casts x to its
``compute_dtype`` and its output back, packs its weight anew on CPUs with bf16 instructions, and chooses a dtype and
casts its bias when it is called first: wherever it would do one of these, it is called. One case is a block's, too:
float32 hidden states, as PEFT's ``prepare_model_for_kbit_training`` has them, under an autocast to ``compute_dtype``.
"""

import torch
from torch import Tensor, nn

from dorac import functional, packed
from dorac.nn import norm_cache, shared
from dorac.nn.keeper import Keeper
from dorac.ops import front
from dorac.ops.packed_product import Held

# Up to so many rows without gradients, as in generation, the library has faster kernels for a GPU.
FEW_ROWS = 128


def is_stock(layer: nn.Module | None) -> bool:
    """Whether it is of the library's class itself, with the library's forward; nothing is imported to tell."""
    kind = type(layer)
    if kind.__name__ != "Linear4bit" or kind.__bases__ != (nn.Linear,):
        return False
    forward = kind.forward
    return forward.__module__ == kind.__module__ and not hasattr(forward, "__wrapped__")


def takes(layer: nn.Module | None, x: Tensor) -> bool:
    """Whether ``layer(x)`` is a block's product with the dense weight, as far as it is known without that.

    Its result has x's dtype: see :func:`shared.as_called`.
    """
    if not is_stock(layer) or not shared.is_plainly_called(layer):
        return False
    attributes, parameters, dtype = vars(layer), layer._parameters, _product_dtype(layer, x)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if getattr(weight, "quant_state", None) is None or not attributes.get("compute_type_is_set", True):
        return False
    autocast = front.autocast_dtype(x)
    if autocast not in (None, dtype) or (x.dtype is not dtype and (x.dtype is not torch.float32 or autocast is None)):
        return False
    if bias is not None and not (shared.is_plain(bias) and bias.dtype is dtype):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    if x.device.type == "cpu":
        return layer.training or not attributes.get("support_avx512bf16_for_cpu", False)
    return torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1]


def alone(layer: shared.Fusable, x: Tensor) -> Tensor | None:
    """What the layer gives for x, as a block of its own; None where it has to call its base layer."""
    if not isinstance(x, Tensor) or not is_stock(layer._modules["base_layer"]):
        return None
    if not (front.all_eager(x) and front.has_kernels(x) and front.unobserved(but_by_modes=True)):
        return None
    if getattr(layer, "shards", None) is not None or (found := layer.projection(x)) is None:
        return None
    projection, dropout_on = found
    (y,) = functional.dora_linears(x, (projection,), dropout_on=dropout_on)
    return shared.as_called(y, x, projection)


def weight_for(layer: nn.Module, x: Tensor, keeper: Keeper | None = None, norm: Tensor | None = None) -> Held | None:
    """The packed weight of a layer that takes x, for a block; None where the layer makes another dense one of it.

    Looked at once for the norm and the product of a forward.

    ``keeper``, ``norm``: of :func:`norm_cache.packed_weight`.
    """
    weight = norm_cache.packed_weight(keeper, layer, norm)
    value = weight.weight if type(weight) is Held else weight
    if type(value) is not packed.Bnb4bit or value.codes.device != x.device:
        return None
    if value.dtype is not _product_dtype(layer, x):  # the layer rounds it once, a block twice
        return None
    if value.shape != (layer.out_features, layer.in_features):
        return None
    return weight if type(weight) is Held else Held(value)


def _product_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    return vars(layer)["compute_dtype"] or x.dtype
