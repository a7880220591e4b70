"""What an adapter's file holds of a model: its tensors under PEFT's keys."""

from collections.abc import Mapping

from torch import Tensor, nn

from dorac.names import plain_name
from dorac.nn import KINDS, DoraLayer, residual
from dorac.wrapped import saved_modules

PREFIX = "base_model.model."
ENDINGS = tuple({key for kind in KINDS for key in kind.PEFT_KEYS.values()})


def key_of(module: str, name: str) -> str:
    """PEFT's key of a tensor of a module, whether that is compiled or not."""
    return PREFIX + plain_name(f"{module}.{name}")


def over_residuals(layers: Mapping[str, DoraLayer]) -> list[tuple[str, DoraLayer, list[str]]]:
    """The layers that began as a part of their base weights, with their names and PEFT's keys of lora_A and lora_B."""
    return [
        (name, layer, [key_of(name, layer.PEFT_KEYS[factor]) for factor in residual.INITIAL])
        for name, layer in layers.items()
        if residual.has_residual(layer)
    ]


def adapter_tensors(model: nn.Module, layers: dict[str, DoraLayer]) -> dict[str, Tensor]:
    """The model's own tensors under PEFT's keys."""
    adapters = {
        key_of(name, key): getattr(layer, attribute)
        for name, layer in layers.items()
        for attribute, key in layer.PEFT_KEYS.items()
    }
    return adapters | saved_tensors(model, saved_modules(model))


def saved_parts(model: nn.Module, layers: Mapping[str, DoraLayer]) -> list[nn.Module]:
    """The modules that hold what an adapter's file does."""
    return [*layers.values(), *(part for name in saved_modules(model) for part in model.get_submodule(name).modules())]


def saved_tensors(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    return {
        key_of(name, key): tensor
        for name in saved
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()
    }


def refuse_root(layers: dict[str, DoraLayer]) -> None:
    if "" in layers:
        kind = type(layers[""]).__name__
        raise ValueError(f"the model is itself a {kind}, which PEFT's keys cannot name; pass a model that holds it")


def embedding_tensors(ends: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of embeddings and heads under the keys that PEFT saves them with."""
    return {
        key_of(name, f"base_layer.{key}"): parameter
        for name, module in ends.items()
        for key, parameter in module.named_parameters()
    }
