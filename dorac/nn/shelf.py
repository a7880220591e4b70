"""Several adapters of one module: the active one's tensors are the module's own, the others' lie on its shelf.

The shelf is a dictionary from every adapter's name to its tensors and settings, ``None`` for the active one. What lies
there is in no ``parameters()``, optimizer or state dict, and follows moves, casts, copies and pickles of the layer.

A switch exchanges the ``Parameter`` objects, not what is in them. An optimizer that was made for one adapter goes on
holding that adapter's tensors, with its state; a graph that is alive keeps what it saved. Compiled code takes
parameters as inputs and is guarded by their shapes, dtypes and ``requires_grad``: it runs on.
"""

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dorac import offload
from dorac.nn import compiled_norm
from dorac.nn.hyperparameters import attribute
from dorac.nn.keeper import Keeper
from dorac.nn.moments import plainly
from dorac.ops import sharded
from dorac.undo import Undo

if TYPE_CHECKING:
    from dorac.nn.layer import DoraLayer

SHELF_ATTRIBUTE = "dora_adapters"  # where a module that is trained whole has its shelf
# What an adapter has beside its tensors.
SETTINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "dropout_on",
    "init_lora_weights",
    "_scaling",
    "_strength",
    "magnitude_loaded",
)


class Shelved(nn.Module):
    """The tensors and settings of an adapter that is not active; a module, but nobody's child."""

    # Whether it was drawn and never active: its magnitude is the norm of the base weight that is there then.
    fresh = False

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter | None],
        buffers: Mapping[str, Tensor | None],
        settings: Mapping[str, object],
    ) -> None:
        super().__init__()
        self._parameters.update(parameters)  # past register_parameter, which refuses names that modules have
        self._buffers.update(buffers)
        self.settings = dict(settings)

    def move(self, fn) -> None:
        """``_apply``; what gets memory and no values, by ``to_empty``, is NaN, which nobody takes for values."""
        empty = [name for name, p in self._parameters.items() if p is not None and p.is_meta]
        self._apply(fn)
        with torch.no_grad():
            for name in empty:
                self._parameters[name].fill_(torch.nan)


def new_adapter(layer: "DoraLayer", shapes: Mapping[str, torch.Size], settings: Mapping[str, object]) -> Shelved:
    """An adapter without values, of the dtypes, device and ``requires_grad`` that the active one has."""
    with torch.inference_mode(False):  # what is made in inference mode could never be trained
        parameters = {
            name: nn.Parameter(torch.empty(shapes[name], dtype=old.dtype, device=old.device), old.requires_grad)
            for name, old in layer._parameters.items()
        }
    present = {name: getattr(layer, name) for name in SETTINGS}
    return Shelved(parameters, {}, present | settings)


def shelf_of(module: nn.Module, active: str) -> dict[str, Shelved | None]:
    """The shelf of a module that is trained whole, whose tensors are those of the active adapter."""
    return vars(module).setdefault(SHELF_ATTRIBUTE, {active: None})


def copied(module: nn.Module, memo: dict[int, Tensor]) -> Shelved:
    """A copy of a module's own tensors; ``memo``: the copies that were made, for tensors in several places."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in memo:
            with torch.inference_mode(False), torch.no_grad():
                value = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if _is_parameter(tensor) else value
        return memo[id(tensor)]

    return Shelved({n: copy(p) for n, p in module._parameters.items()}, {n: copy(b) for n, b in _buffers(module)}, {})


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Those that are saved."""
    return [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]


def exchange_whole(module: nn.Module, name: str, active: str, log: Undo) -> None:
    """Puts an adapter's tensors in the place of the active one's in a module that is trained whole."""
    log.keep_module(module)
    shelf = shelf_of(module, active)
    new = shelf[name]
    for registry, tensors in ((module._parameters, new._parameters), (module._buffers, new._buffers)):
        for key, tensor in tensors.items():
            _follow(tensor, registry[key], log)
    shelf[active] = Shelved(module._parameters, dict(_buffers(module)), {})
    shelf[name] = None
    module._parameters.update(new._parameters)
    module._buffers.update(new._buffers)


def _follow(tensor: Tensor | None, present: Tensor | None, log: Undo) -> None:
    """Moves and casts a tensor to where the present one is: nobody tells this module's shelf when that moves."""
    if tensor is None or (tensor.device, tensor.dtype) == (present.device, present.dtype):
        return
    for held, like in ((tensor, present), (tensor.grad, present)):
        if held is not None:
            log.keep_attribute(held, "data")
            held.data = held.data.to(like.device, like.dtype)


def exchange(layer: "DoraLayer", name: str, log: Undo, *, norms: bool = True) -> bool:
    """Puts an adapter in the place of the active one.

    Args:
        norms: whether kept norms are exchanged, too; without, no forward may follow before the log takes this back.

    Returns:
        Whether a kept norm is still to be taken.
    """
    active, new = layer.adapter_name, layer.adapters[name]
    if norms:
        layer.keep_norm(log)
        shelve_norm(layer, active)
    else:
        log.keep_module(layer)
    layer.adapters[active] = Shelved(layer._parameters, {}, {key: getattr(layer, key) for key in SETTINGS})
    layer.adapters[name] = None
    layer.adapter_name = name
    layer._parameters.update(new._parameters)
    vars(layer).update({attribute(name): value for name, value in new.settings.items()})
    layer.switch(layer.disabled)
    if new.fresh:
        log.keep(*layer._magnitudes())
        with torch.no_grad(), offload.onloaded(layer.base_layer):
            layer._reset_magnitudes()
    return norms and layer.kept is not None and not unshelve_norm(layer, name)


def unswitchable(layer: "DoraLayer") -> str | None:
    """Why no other adapter can take the place of the active one now, or None."""
    if layer.merged:
        return "its adapter is merged: call dorac.unmerge first"
    if layer.disabled:
        return "its adapter is switched off: leave dorac.disabled first"
    if layer.waiting is not None:
        return "it was made on meta and its adapter has no values yet: load the base weights first"
    if "initial_lora_A" in layer._parameters:
        return (
            "its adapter began as a part of the base weight, which several adapters would share: save it, and load it "
            "over the original weight"
        )
    if offload.is_offloaded(layer):
        return "its adapter is offloaded by accelerate: dispatch the model first and adapt it then"
    if layer._parameters.keys() != layer.PEFT_KEYS.keys():
        return "its adapter is in parts, or computed (FSDP, a parametrisation)"
    return in_parts(layer)


def in_parts(module: nn.Module) -> str | None:
    """Why the shelf of a module does not go with its tensors, or None if it does."""
    own = [p for p in module._parameters.values() if p is not None]
    if sharded.any_sharded(*own) or any(hasattr(p, "ds_id") for p in own):
        return "its tensors are sharded (DTensor, DeepSpeed ZeRO-3), which holds for one adapter only"
    return None


def unswitchable_whole(module: nn.Module) -> str | None:
    """As :func:`unswitchable`, of a module that is trained whole."""
    if offload.is_offloaded(module):
        return "it is offloaded by accelerate: dispatch the model first and adapt it then"
    return in_parts(module)


_OF_NORM = ("norm", "of", "scaling", "at", "source")


def shelve_norm(layer: Keeper, adapter: str) -> None:
    """Puts the norm of the active adapter away, under its name, for :func:`unshelve_norm`; the layer has none then."""
    kept = layer.kept
    if kept is None:
        return
    if kept.of is not None and kept.at is not None and not kept.in_doubt:
        kept.shelved = (kept.shelved or {}) | {adapter: {name: getattr(kept, name) for name in _OF_NORM}}
    vars(kept).update(dict.fromkeys(_OF_NORM))
    compiled_norm.tell(layer)


def unshelve_norm(layer: Keeper, adapter: str) -> bool:
    """Brings back the norm of an adapter that has become active; whether it still is that of its tensors."""
    kept = layer.kept
    shelved = (kept.shelved or {}).get(adapter)
    if shelved is None:
        return False
    forget_norm(layer, adapter)
    vars(kept).update(shelved)  # a norm that has passed is written anew in the same memory
    compiled_norm.tell(layer)
    *of, _ = kept.of
    inputs = layer.norm_inputs()
    same = len(of) == len(inputs) and all(map(operator.is_, inputs, of)) and kept.scaling == layer.scaling
    with plainly():
        return same and not kept.at.passed(kept.of)


def forget_norm(layer: Keeper, adapter: str) -> None:
    """Forgets the norm of an adapter that is not active, if one was put away."""
    kept = layer.kept
    if kept is not None and kept.shelved is not None:
        kept.shelved = {name: shelved for name, shelved in kept.shelved.items() if name != adapter}
