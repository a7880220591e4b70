"""PEFT's own starts of an adapter, for linear layers of ``dorac.nn``: decompositions of the weight, and of data.

PEFT's code computes the factors. What it takes out of the base weight for them is computed here, from the factors as
the layer holds them, so that the start is the frozen layer's function whatever their dtype.
"""

import copy
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dorac import callers
from dorac.nn import DoraLayer, DoraLinear, layer_class, residual
from dorac.nn.linear import is_conv1d
from dorac.nn.quantised import DoraQuantLinear
from dorac.numerics import accumulate_dtype
from dorac.ops import sharded
from dorac.peft.switch import require_peft
from dorac.undo import Undo

_NAMES = r"pissa(_niter_\d+)?|olora|corda|lora_ga|orthogonal|eva"
_KEEPING = ("orthogonal", "eva")  # the base weight; all others take a part out of it
# What PEFT's preprocess_corda and preprocess_loraga leave on a module.
_PREPARED = {"corda": ("eigens", "preprocess_corda"), "lora_ga": ("_peft_loraga_grad", "preprocess_loraga")}


def takes_out(init: str) -> bool:
    """Whether the start takes a part out of the base weight."""
    return init not in _KEEPING


def check(init: str, modules: Mapping[str, nn.Module], config: object, eva_state_dict: object) -> None:
    """Refuses a start that PEFT does not have with DoRA, one without its data, and modules that it is not for.

    Raises:
        ImportError: no PEFT, or another one. TypeError, ValueError: the rest.
    """
    if init == "mica":
        raise ValueError("init_lora_weights='mica' is not supported: PEFT has no DoRA with it")
    if not re.fullmatch(_NAMES, init):
        raise ValueError(
            "init_lora_weights must be True, False, 'gaussian', 'loftq' or, where PEFT is installed, 'pissa', "
            f"'pissa_niter_[number]', 'olora', 'orthogonal', 'eva', 'corda' or 'lora_ga', got {init!r}"
        )
    require_peft()
    if init == "eva" and not isinstance(eva_state_dict, Mapping):
        raise TypeError(
            "init_lora_weights='eva' needs eva_state_dict, what peft.get_eva_state_dict(model, dataloader, config) "
            f"returns, got {type(eva_state_dict).__name__}"
        )
    if init == "lora_ga" and getattr(config, "lora_ga_config", None) is None:
        raise ValueError("init_lora_weights='lora_ga' needs a LoraConfig with lora_ga_config")
    reasons = [f"{name}: {reason}" for name, module in modules.items() if (reason := _unfit(init, module))]
    if reasons:
        raise ValueError(
            f"init_lora_weights={init!r} cannot start these modules (name them in exclude_modules, and adapt them in "
            "another call):\n  " + "\n  ".join(reasons)
        )


def _unfit(init: str, module: nn.Module) -> str | None:
    """Why the module cannot have this start, or None if it can."""
    cls = layer_class(module)
    if not issubclass(cls, DoraLinear):
        return None if init == "eva" else f"{type(module).__name__} is no linear layer"
    if issubclass(cls, DoraQuantLinear):
        return f"{type(module).__name__} is quantised, and would be quantised anew" if takes_out(init) else None
    if module.weight.is_meta:
        return "its weight is on meta: load the weights first"
    if sharded.any_sharded(module.weight):
        return "its weight is sharded: do this before the model is sharded"
    attribute, preprocess = _PREPARED.get(init, (None, None))
    if attribute is not None and not hasattr(module, attribute):
        return f"it was not prepared: call peft's {preprocess} with the same config first"
    return None


def check_again(init: str, modules: Mapping[str, nn.Module]) -> None:
    """Refuses modules whose part :func:`begin_again` cannot take out.

    Raises:
        ImportError: no PEFT, or another one. ValueError: the rest, by name.
    """
    require_peft()
    # PEFT's other layers know no such starts.
    linear = {name: module for name, module in modules.items() if issubclass(layer_class(module), DoraLinear)}
    reasons = [f"{name}: {reason}" for name, module in linear.items() if (reason := _unfit(init, module))]
    if init == "olora":  # PEFT decomposes what is stored, which no adapter of the weight is a part of
        conv1d = (name for name, module in linear.items() if is_conv1d(module))
        reasons += [f"{name}: PEFT's OLoRA of a Conv1D is of the transposed weight" for name in conv1d]
    if reasons:
        raise ValueError(
            f"the adapter is over what init_lora_weights={init!r} leaves of the base weights; the rest cannot be taken "
            "out of these again:\n  " + "\n  ".join(reasons)
        )


def begin_again(init: str, layers: Mapping[str, DoraLinear], log: Undo) -> None:
    """Takes out of the base weights of layers what PEFT took out when it made the adapter.

    The factors are then those that it began with. The log can take it back.

    Raises:
        TypeError, ValueError: as :func:`begin`.
    """
    names = {layer: name for name, layer in layers.items()}  # of one of its places
    for layer, name in names.items():
        log.keep(layer.lora_A, layer.lora_B)
        _write(name, layer, _factors(name, init, layer, None))
        residual.take_out(layer, log)
    _drop_prepared(init, names, log)


def begin(
    init: str,
    layers: Mapping[str, DoraLayer],
    config: object,
    eva_state_dict: Mapping[str, Tensor] | None,
    log: Undo,
) -> None:
    """Gives new layers their start. The log can take all of it back.

    Raises:
        TypeError, ValueError: what PEFT refuses (a rank, a dtype), factors that do not fit or are not finite, by name.
    """
    without, begun = [], set()
    for name, layer in layers.items():
        if layer in begun:  # under another name
            continue
        begun.add(layer)
        if init != "eva":
            factors = _factors(name, init, layer, config)
        elif isinstance(layer, DoraLinear) and name in eva_state_dict:
            factors = {"lora_A": eva_state_dict[name]}  # lora_B stays zero
        else:
            without.append(name)
            continue
        _write(name, layer, factors)
        if takes_out(init):
            residual.take_out(layer, log)
        with torch.no_grad():
            layer._reset_magnitudes()
    _drop_prepared(init, begun, log)
    if without:
        callers.warn(
            f"eva_state_dict has nothing for {', '.join(without[:8])}{', ...' if len(without) > 8 else ''}: these "
            "layers start as with init_lora_weights=True",
        )


def _drop_prepared(init: str, layers: Iterable[DoraLayer], log: Undo) -> None:
    if init in _PREPARED:
        for layer in layers:
            log.keep_module(layer.base_layer)
            delattr(layer.base_layer, _PREPARED[init][0])


@torch.no_grad()
def _factors(name: str, init: str, layer: DoraLinear, config: object) -> dict[str, Tensor]:
    """What PEFT's layer over a stand-in for the base layer starts with."""
    from peft import LoraConfig

    from dorac.stock_peft import CordaConfig, Linear

    settings = LoraConfig(
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        use_rslora=layer.use_rslora,
        init_lora_weights=init,
        corda_config=CordaConfig() if init == "corda" else None,
        lora_ga_config=config.lora_ga_config if init == "lora_ga" else None,
    )
    try:
        wrapped = Linear(_stand_in(init, layer), "default", settings, r=layer.r, lora_alpha=layer.lora_alpha)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name}: {error}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return {factor: getattr(wrapped, factor)["default"].weight for factor in ("lora_A", "lora_B")}


def _stand_in(init: str, layer: DoraLinear) -> nn.Linear:
    """A layer for PEFT to write to, with copies of the weight, ``[out, in]`` however it is stored, and of the data.

    The weight is float32 where it is half precision, to which PEFT would round the factors after it has taken them out.
    """
    module, base = nn.Linear(1, 1, bias=False), layer.base_layer
    module.out_features, module.in_features = layer.lora_B.shape[0], layer.lora_A.shape[1]
    if init == "orthogonal":  # which asks for the sizes and a dtype alone
        return module
    matrix = layer._matrix()
    module.weight = nn.Parameter(matrix.to(accumulate_dtype(matrix), copy=True), requires_grad=False)
    if init == "corda":
        module.eigens = copy.deepcopy(base.eigens)
    elif init == "lora_ga":
        gradient = base._peft_loraga_grad
        module._peft_loraga_grad = gradient.T if layer.fan_in_fan_out else gradient
    return module


@torch.no_grad()
def _write(name: str, layer: DoraLinear, factors: Mapping[str, Tensor]) -> None:
    for key, value in factors.items():
        parameter = getattr(layer, key)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name}: {key} of this start has the shape {list(value.shape)}, the layer's is "
                f"{list(parameter.shape)}: the rank is more than the weight or the data have"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name}: {key} of this start is not finite")
        parameter.copy_(value)
