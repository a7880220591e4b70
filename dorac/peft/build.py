"""How PEFT's LoRA layers are built over dorac's variants, with nothing changed that another model or thread would see.

PEFT chooses a layer's class in functions of its own, and a layer its variant. What is built here goes through copies of
those functions that find other classes under the same names, and through subclasses that take dorac's variants.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from dorac import stock_peft
from dorac.peft import layer, variants
from dorac.stock_peft import BaseTunerLayer, LoraLayer

_create_new_module_stock = stock_peft.create_new_module


class _OnDorac(variants.TakesVariants):
    """A LoRA layer class of PEFT's or of a third party while its adapter is built; ``stock`` is that class."""

    stock: type


def building_class(cls: type) -> type:
    """The class to build a LoRA layer of ``cls`` with: dorac's subclass of it, or one for the time of building."""
    if issubclass(cls, variants.TakesVariants):
        return cls
    if cls.__name__ in layer.__all__ and getattr(stock_peft, cls.__name__) is cls:
        return getattr(layer, cls.__name__)
    return type(cls.__name__, (_OnDorac, cls), {"stock": cls, "__module__": cls.__module__})


def built_class(cls: type) -> type:
    """The class that a layer keeps which was built with ``cls``."""
    return cls.stock if issubclass(cls, _OnDorac) else cls


def create_new_module(lora_config, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    """PEFT's ``LoraModel._create_new_module``: a LoRA layer over ``target``."""
    if lora_config.use_dora:
        for dispatch in (_dispatch_custom, *_dispatchers()):
            module = dispatch(target, adapter_name, config=lora_config, **kwargs)
            if module is not None:
                module.__class__ = built_class(type(module))
                return module
    return _create_new_module_stock(lora_config, adapter_name, target, **kwargs)


def _dispatch_custom(target: nn.Module, adapter_name: str, config, **kwargs: Any) -> nn.Module | None:
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, cls in (config._custom_modules or {}).items():
        if isinstance(base_layer, kind):
            ours = building_class(cls) if isinstance(cls, type) and issubclass(cls, LoraLayer) else cls
            return ours(target, adapter_name, config=config, **kwargs)
    return None


@functools.cache
def _dispatchers() -> tuple[Callable, ...]:
    """PEFT's functions that build a layer over a target of one kind, in its order."""
    found = [*stock_peft.DISPATCHERS]
    if stock_peft.is_bnb_available():
        found = ["dispatch_bnb_8bit", *(["dispatch_bnb_4bit"] if stock_peft.is_bnb_4bit_available() else []), *found]
    return tuple(_building(getattr(stock_peft, name)) for name in found)


def _building(dispatch: FunctionType) -> FunctionType:
    classes = {
        name: building_class(cls)
        for name, cls in dispatch.__globals__.items()
        if isinstance(cls, type) and issubclass(cls, LoraLayer) and cls is not LoraLayer
    }
    return variants.with_names(dispatch, classes)
