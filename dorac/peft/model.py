"""PEFT's ``LoraModel``, which puts adapters into a model, with dorac under those that it adds."""

from peft.tuners.lora import model

from dorac.peft.switch import building, switch
from dorac.peft.weighted import add_weighted_adapter

__all__ = ["LoraModel"]

_create_and_replace_stock = model.LoraModel._create_and_replace


def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs) -> None:
    with building():
        _create_and_replace_stock(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
    switch(getattr(parent, target_name), target_name)


# What stock PEFT's class gets while everything that PEFT builds runs on dorac.
METHODS = {"_create_and_replace": _create_and_replace, "add_weighted_adapter": add_weighted_adapter}


class LoraModel(model.LoraModel):
    """That of one enabled model."""

    _create_and_replace = _create_and_replace
    add_weighted_adapter = add_weighted_adapter
