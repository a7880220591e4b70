"""Adapters over a part of the base weights, as a start of PEFT's has left them: what is taken out when they load."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dorac import callers, offload
from dorac.nn import DoraLayer, DoraLinear, residual
from dorac.undo import Undo
from dorac.wrapped import refuse_tied


def refuse_to_take_out(
    start: str, directory: Path, layers: Mapping[str, DoraLayer], bases: Mapping[str, nn.Module]
) -> None:
    """Refuses an adapter over a part of the base weights that cannot be had in this model."""
    from dorac.peft import inits  # imported only for a start of PEFT's

    begun = next((name for name, layer in layers.items() if residual.has_residual(layer)), None)
    if begun is not None:
        raise ValueError(
            f"the adapter in {directory} is over what init_lora_weights={start!r} leaves of the original base weights; "
            f"here a part of them is taken out already ({begun}, ...): load it into the plain model"
        )
    try:
        inits.check_again(start, bases)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def take_out(start: str, model: nn.Module, layers: Mapping[str, DoraLayer], log: Undo) -> None:
    """Takes out of the base weights what was taken out when the adapter was made, as PEFT does when it loads it."""
    from dorac.peft import inits

    linear = {name: layer for name, layer in layers.items() if isinstance(layer, DoraLinear)}
    refuse_tied(model, linear.values(), f"init_lora_weights={start!r}")
    with offload.written(log, *linear.values(), *(layer.base_layer for layer in linear.values())):
        inits.begin_again(start, linear, log)
    if "niter" in start:
        callers.warn(
            f"the adapter is over what init_lora_weights={start!r} left of the base weights, a decomposition with "
            "random numbers: what is left now is that as far as the decomposition converges",
        )
