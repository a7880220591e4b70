"""PEFT's ``LoraModel``, which puts adapters into a model, with dorac under those that it adds."""

import inspect

from torch import Tensor, nn

from dorac import offload, stock_peft
from dorac.nn.stock import MIXED
from dorac.peft.build import building_class, built_class, create_new_module
from dorac.peft.merging import merge_adapter, unload_and_optionally_merge, unmerge_adapter
from dorac.peft.mixed import enable_peft_forward_hooks
from dorac.peft.state import state
from dorac.peft.switch import DROPOUT_ON, set_dropout_on, switch
from dorac.peft.uncovered import report
from dorac.peft.variants import adapters_on_dorac, factors
from dorac.peft.weighted import add_weighted_adapter
from dorac.places import dora_layers
from dorac.stock_peft import AdaLoraLayer, LoraLayer
from dorac.undo import Undo

__all__ = ["LoraModel"]

_create_and_replace_stock = stock_peft.create_and_replace
_cast_adapter_dtype_stock = stock_peft.cast_adapter_dtype
_inject_adapter_stock = stock_peft.LoraModel.inject_adapter
_subtract_mutated_init_stock = stock_peft.LoraModel.subtract_mutated_init


def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs) -> None:
    """PEFT's; if it fails, the target is as it was."""
    with state.lock, Undo() as log:
        log.add(lambda: getattr(parent, target_name) is target or setattr(parent, target_name, target))
        if lora_config.use_dora and isinstance(target, LoraLayer) and not isinstance(target, AdaLoraLayer):
            log.keep_module(*target.modules())
            log.keep_requires_grad(target.parameters())
            log.keep_attribute(target, "__class__")
            target.__class__ = building_class(type(target))
        with offload.onloaded(*target.modules()):  # the adapter goes to where the weight then is, and takes its norm
            _create_and_replace_stock(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        target.__class__ = built_class(type(target))
        layer = getattr(parent, target_name)
        switch(layer, log)
        set_dropout_on([layer], vars(self).get(DROPOUT_ON, state.dropout_on), log, adapter_name)


def _inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    if name := next(iter(dora_layers(model)), None):
        raise ValueError(MIXED.format(name))
    _inject_adapter_stock(self, model, adapter_name, *args, **kwargs)
    with state.lock:
        report(model, state.reported)


def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """PEFT widens half-precision adapters to float32, or leaves them in the model's dtype: then magnitudes too.

    Until they are trained: see :mod:`dorac.magnitudes`.
    """
    _cast_adapter_dtype_stock(self, adapter_name, autocast_adapter_dtype)
    if autocast_adapter_dtype:
        return
    for _, layer, _ in adapters_on_dorac(self.model, adapter_name):
        magnitude = layer.lora_magnitude_vector[adapter_name].weight
        magnitude.data = magnitude.data.to(factors(layer, adapter_name)[0].dtype)


def _subtract_mutated_init(self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs=None):
    """PEFT's, which makes an adapter over the whole weight of one over a part of it, with its magnitudes, too."""
    magnitudes = {name: t for name, t in output_state_dict.items() if "lora_magnitude_vector" in name}
    return magnitudes | _subtract_mutated_init_stock(self, output_state_dict, adapter_name, kwargs)


class LoraModel(stock_peft.LoraModel):
    """That of one enabled model."""

    _cast_adapter_dtype = _cast_adapter_dtype
    _create_and_replace = _create_and_replace
    _create_new_module = staticmethod(create_new_module)
    _enable_peft_forward_hooks = enable_peft_forward_hooks
    _unload_and_optionally_merge = unload_and_optionally_merge
    add_weighted_adapter = add_weighted_adapter
    inject_adapter = _inject_adapter
    merge_adapter = merge_adapter
    subtract_mutated_init = _subtract_mutated_init
    unmerge_adapter = unmerge_adapter


# What stock PEFT's class gets while everything that PEFT builds runs on dorac.
METHODS = {name: inspect.getattr_static(LoraModel, name) for name in vars(LoraModel) if not name.startswith("__")}
