"""What dorac reads of PEFT that ``peft.__all__`` does not have: where a release moves a name, this file is mended.

A name is looked up when it is asked for (``from dorac.stock_peft import LoraLayer``), and its module imported then:
dorac runs without PEFT, and some of these modules need another library. ``tests/test_peft_names.py`` fails if PEFT has
moved one, and if another file reads one past this.
"""

import functools
import importlib
import sys
from types import ModuleType

# What builds a LoRA layer over a target of one kind, in PEFT's order; bitsandbytes' come before these.
DISPATCHERS = tuple(
    f"dispatch_{kind}"
    for kind in ("eetq", "aqlm", "awq", "gptq", "hqq", "inc", "torchao", "megatron", "transformer_engine", "default")
)

PLACES = {
    # The magnitudes, which dorac's subclass: isinstance keeps its meaning, and the constructor is PEFT's.
    "DoraLinearLayer": "peft.tuners.lora.dora:DoraLinearLayer",
    "DoraEmbeddingLayer": "peft.tuners.lora.dora:DoraEmbeddingLayer",
    "_DoraConvNdLayer": "peft.tuners.lora.dora:_DoraConvNdLayer",
    "DoraConv1dLayer": "peft.tuners.lora.dora:DoraConv1dLayer",
    "DoraConv2dLayer": "peft.tuners.lora.dora:DoraConv2dLayer",
    "DoraConv3dLayer": "peft.tuners.lora.dora:DoraConv3dLayer",
    # Their dense products, past PEFT's cache.
    "linear_lora_weight": "peft.tuners.lora.dora:DoraLinearLayer.get_lora_weight.__wrapped__",
    "embedding_lora_weight": "peft.tuners.lora.dora:DoraEmbeddingLayer.get_lora_weight.__wrapped__",
    "conv_lora_weight": "peft.tuners.lora.dora:_DoraConvNdLayer.get_lora_weight.__wrapped__",
    "dora_caching": "peft.tuners.lora.dora:ENABLE_DORA_CACHING",  # what DoraCaching sets
    # The variants, through which a LoRA layer calls its magnitudes.
    "LoraVariant": "peft.tuners.lora.variants:LoraVariant",  # the class of all
    "DoraLinearVariant": "peft.tuners.lora.variants:DoraLinearVariant",
    "DoraEmbeddingVariant": "peft.tuners.lora.variants:DoraEmbeddingVariant",
    "DoraConv1dVariant": "peft.tuners.lora.variants:DoraConv1dVariant",
    "DoraConv2dVariant": "peft.tuners.lora.variants:DoraConv2dVariant",
    "DoraConv3dVariant": "peft.tuners.lora.variants:DoraConv3dVariant",
    # Layers with adapters.
    "LoraLayer": "peft.tuners.lora:LoraLayer",  # with LoRA's
    "AdaLoraLayer": "peft.tuners.adalora:AdaLoraLayer",  # a LoraLayer that has no DoRA
    "BaseTunerLayer": "peft.tuners.tuners_utils:BaseTunerLayer",  # with those of any method
    "AuxiliaryTrainingWrapper": "peft.utils.other:AuxiliaryTrainingWrapper",  # modules_to_save, trained tokens
    "Linear": "peft.tuners.lora.layer:Linear",  # over dense weights
    "Embedding": "peft.tuners.lora.layer:Embedding",
    "Conv1d": "peft.tuners.lora.layer:Conv1d",
    "Conv2d": "peft.tuners.lora.layer:Conv2d",
    "Conv3d": "peft.tuners.lora.layer:Conv3d",
    "Linear4bit": "peft.tuners.lora.bnb:Linear4bit",  # over bitsandbytes' weights
    "Linear8bitLt": "peft.tuners.lora.bnb:Linear8bitLt",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao:TorchaoLoraLinear",  # over torchao's
    "check_adapters_to_merge": "peft.tuners.tuners_utils:check_adapters_to_merge",  # which are not merged yet
    # LoraModel, and those of its methods that dorac's call.
    "LoraModel": "peft.tuners.lora.model:LoraModel",
    "create_and_replace": "peft.tuners.lora.model:LoraModel._create_and_replace",  # an adapter in a place
    "create_new_module": "peft.tuners.lora.model:LoraModel._create_new_module",  # a LoRA layer over a target
    "cast_adapter_dtype": "peft.tuners.lora.model:LoraModel._cast_adapter_dtype",  # half precision to float32
    "enable_forward_hooks": "peft.tuners.lora.model:LoraModel._enable_peft_forward_hooks",  # for adapter_names
    "unload_and_optionally_merge": "peft.tuners.lora.model:LoraModel._unload_and_optionally_merge",
    # What chooses a layer's class.
    **{name: f"peft.tuners.lora.model:{name}" for name in DISPATCHERS},
    "dispatch_bnb_8bit": "peft.tuners.lora.bnb:dispatch_bnb_8bit",
    "dispatch_bnb_4bit": "peft.tuners.lora.bnb:dispatch_bnb_4bit",
    "is_bnb_available": "peft.import_utils:is_bnb_available",
    "is_bnb_4bit_available": "peft.import_utils:is_bnb_4bit_available",
    # Configs, and what a combined adapter is like.
    "CordaConfig": "peft.tuners.lora.config:CordaConfig",  # of the start "corda"
    "default_targets": "peft.utils:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",  # by the model's type
    "freeze_adapter": "peft.utils:_freeze_adapter",
    "get_pattern_key": "peft.utils.other:get_pattern_key",  # which key of rank_pattern means a module
    # Weights that are made dense.
    "dequantize_bnb_weight": "peft.utils.integrations:dequantize_bnb_weight",
    "dequantize_module_weight": "peft.utils.integrations:dequantize_module_weight",
    # Adapters swapped in place; dorac puts its own in the place of the first two.
    "hotswap_adapter_from_state_dict": "peft.utils.hotswap:hotswap_adapter_from_state_dict",
    "convert_scalings_to_tensor": "peft.utils.hotswap:_convert_scalings_to_tensor",
    "update_scaling": "peft.utils.hotswap:_update_scaling",
    # The names under which transformers 5 looks for the tensors of a file; dorac adds the magnitudes'.
    "is_transformers_ge_v5": "peft.import_utils:is_transformers_ge_v5",
    "build_peft_weight_mapping": "peft.utils.transformers_weight_conversion:build_peft_weight_mapping",
}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(*place(name))


def place(name: str) -> tuple[type | ModuleType, str]:
    """Whose attribute it is that has this name here, and what PEFT calls it: for what is set, or read again."""
    module, _, path = PLACES[name].partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def is_imported(name: str) -> bool:
    """Whether somebody has imported the module that has what is called so here; if not, there is no instance of it."""
    return sys.modules.get(PLACES[name].partition(":")[0]) is not None
