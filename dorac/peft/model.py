"""PEFT's ``LoraModel``, which puts adapters into a model, with dorac under those that it adds."""

from peft.tuners.lora import LoraLayer, model

from dorac.peft.switch import building, switch
from dorac.peft.variants import OnDorac, factors
from dorac.peft.weighted import add_weighted_adapter

__all__ = ["LoraModel"]

_create_and_replace_stock = model.LoraModel._create_and_replace
_cast_adapter_dtype_stock = model.LoraModel._cast_adapter_dtype


def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs) -> None:
    with building():
        _create_and_replace_stock(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
    switch(getattr(parent, target_name), target_name)


def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """PEFT widens half-precision adapters to float32, or leaves them in the model's dtype: then magnitudes too."""
    _cast_adapter_dtype_stock(self, adapter_name, autocast_adapter_dtype)
    if autocast_adapter_dtype:
        return
    for layer in self.model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_variant.get(adapter_name), OnDorac):
            layer.lora_magnitude_vector[adapter_name].to(factors(layer, adapter_name)[0].dtype)


# What stock PEFT's class gets while everything that PEFT builds runs on dorac.
METHODS = {
    "_cast_adapter_dtype": _cast_adapter_dtype,
    "_create_and_replace": _create_and_replace,
    "add_weighted_adapter": add_weighted_adapter,
}


class LoraModel(model.LoraModel):
    """That of one enabled model."""

    _cast_adapter_dtype = _cast_adapter_dtype
    _create_and_replace = _create_and_replace
    add_weighted_adapter = add_weighted_adapter
