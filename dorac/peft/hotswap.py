"""``peft.utils.hotswap`` for DoRA: PEFT looks a magnitude up under its key in files, and finds none in the model.

Another adapter's values go into the tensors of one that is there, so that compiled code runs on. What a forward of the
drop-in knows beside them follows: the adapter's own scaling (:meth:`dorac.peft.dora.DoraLinearLayer.split`) and norms
that are kept.
"""

from collections.abc import Iterator
from functools import partial

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dorac import stock_peft
from dorac.nn.hyperparameters import scaling_factor
from dorac.peft import norms
from dorac.peft.variants import adapters_on_dorac
from dorac.peft.weighted import adapter_norm
from dorac.stock_peft import LoraLayer, get_pattern_key, update_scaling
from dorac.undo import Undo

_swap_stock = stock_peft.hotswap_adapter_from_state_dict
_convert_scalings_stock = stock_peft.convert_scalings_to_tensor


def _layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer, str]]:
    """Of a model that may be compiled."""
    return adapters_on_dorac(getattr(model, "_orig_mod", model), adapter)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """PEFT's for DoRA adapters too, all or nothing. A layer that the new one does not adapt becomes its base layer.

    Raises:
        ValueError: an adapted embedding, which PEFT's does not swap; and what PEFT refuses.
    """
    layers = {name: layer for name, layer, _ in _layers(model, adapter_name)}
    if not layers:
        return _swap_stock(model, state_dict, adapter_name, config, parameter_prefix)
    for name, layer in layers.items():
        if adapter_name in layer.lora_embedding_A:
            raise ValueError(f"{name} is an adapted embedding, which PEFT's hotswap does not take: use load_adapter")
    ending = f".lora_magnitude_vector.{adapter_name}"
    state_dict = {f"{key}.weight" if key.endswith(ending) else key: value for key, value in state_dict.items()}
    with Undo() as log, torch.no_grad():
        for layer in layers.values():
            _keep(log, layer, adapter_name)
        _swap_stock(model, state_dict, adapter_name, config, parameter_prefix)
        for name, layer in layers.items():
            key = f"{name}{ending}.weight"
            magnitude = layer.lora_magnitude_vector[adapter_name]
            if key in state_dict:
                _set_scaling(layer, adapter_name, name.removeprefix("base_model.model."), config)
            else:
                norm = adapter_norm(layer, adapter_name)
                magnitude.weight.copy_(norm.view_as(magnitude.weight))
            magnitude._cache_clear()
            norms.refresh(layer)


def _keep(log: Undo, layer: LoraLayer, adapter: str) -> None:
    magnitude = layer.lora_magnitude_vector[adapter]
    log.add(partial(norms.refresh, layer))
    for parameter in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, magnitude.weight):
        memory = parameter.data
        log.keep(memory)
        log.keep_attribute(parameter, "data")
    for values, key in ((layer.scaling, adapter), (layer.lora_alpha, adapter), (layer.r, adapter), *_own(magnitude)):
        log.keep(values[key] if isinstance(values[key], Tensor) else None)
        log.add(partial(values.__setitem__, key, values[key]))


def _own(magnitude: nn.Module) -> list[tuple[dict, str]]:
    return [(vars(magnitude), "own_scaling")] if "own_scaling" in vars(magnitude) else []


def _set_scaling(layer: LoraLayer, adapter: str, name: str, config: LoraConfig) -> None:
    """The scaling of the layer, which PEFT looks up by a tensor's name, that no pattern matches, and what is its own.

    Tensors stay the same ones, which compiled code reads.
    """
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    layer.r[adapter], layer.lora_alpha[adapter] = rank, alpha
    magnitude, scaling = layer.lora_magnitude_vector[adapter], scaling_factor(rank, alpha, config.use_rslora)
    update_scaling(layer, adapter, scaling)
    if isinstance(magnitude.own_scaling, Tensor):
        magnitude.own_scaling.fill_(scaling)
    else:
        magnitude.own_scaling = scaling


def convert_scalings_to_tensor(model: nn.Module) -> bool:
    """PEFT's, of the adapters' own scalings too: a strength beside them is a tensor then."""
    with Undo() as log:
        for _, layer, adapter in _layers(model):
            magnitude = layer.lora_magnitude_vector[adapter]
            log.add(partial(layer.scaling.__setitem__, adapter, layer.scaling[adapter]))
            for values, key in _own(magnitude):
                log.add(partial(values.__setitem__, key, values[key]))
                if not isinstance(values[key], Tensor):
                    values[key] = torch.tensor(float(values[key]), device=magnitude.weight.device)
        return _convert_scalings_stock(model)


# What PEFT's module gets while anything is enabled, by the names in dorac.stock_peft.
FUNCTIONS = {
    "hotswap_adapter_from_state_dict": hotswap_adapter_from_state_dict,
    "convert_scalings_to_tensor": convert_scalings_to_tensor,
}
STOCK = {"hotswap_adapter_from_state_dict": _swap_stock, "convert_scalings_to_tensor": _convert_scalings_stock}
