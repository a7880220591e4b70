"""``save_outputs``: less memory for the eager training of layers whose outputs are saved in any case."""

import sys

from torch import nn


def save_outputs(model: nn.Module, mode: bool = True) -> None:
    """Has the linear layers of ``model`` save their output for backward, in place of a tensor of the same size.

    In eager on a GPU with kernels a layer saves ``x W^T + s x lora_A^T lora_B^T`` for the magnitude's gradient. Where
    what follows saves the layer's output (an activation, a product, attention), that is one tensor too many: saved in
    its place the output costs nothing. Layers with a bias go on as before, and so do tensor-parallel ones that move
    their output (``RowwiseParallel``), and compiled code, in which the compiler decides.

    It is no default because of what it takes for granted: that nobody writes to these outputs behind autograd's back.
    Writes in place that autograd sees are fine; kernels such as Liger's rotary embedding, which overwrites queries and
    keys, make the magnitudes' gradients of the layers before them wrong: leave those out (``save_outputs(model.mlp)``).

    Args:
        model: holds dorac.nn's layers, or PEFT's under ``dorac.peft.enable``; or is one.
        mode: False takes it back.

    Raises:
        TypeError: a mode that is not a bool.
        ValueError: no such linear layer.
    """
    if not isinstance(mode, bool):
        raise TypeError(f"mode must be a bool, got {type(mode).__name__}")
    layers = [module for module in model.modules() if hasattr(type(module), "save_output") or _over_a_product(module)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no linear DoRA layer of dorac's")
    for layer in layers:
        layer.save_output = mode


def _over_a_product(module: nn.Module) -> bool:
    """Whether it is PEFT's class for a quantised layer, under the drop-in: its forward is PEFT's."""
    variants = sys.modules.get("dorac.peft.variants")  # whoever enabled the drop-in has imported it
    if variants is None or not hasattr(module, "lora_variant"):
        return False
    return any(isinstance(variant, variants.DoraLinearVariant) for variant in module.lora_variant.values())
