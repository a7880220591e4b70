"""A model without its adapters, and with them at a strength."""

import contextlib
import copy
import dataclasses
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from dorac import callers, checks
from dorac.nn import DoraLayer, blocks, compiled_norm, loading, merging, residual, starts
from dorac.nn.shelf import SHELF_ATTRIBUTE
from dorac.places import dora_layers
from dorac.undo import Undo
from dorac.wrapped import SAVED_ATTRIBUTE, bare, require_layers, reshard, saved_modules


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """``with dorac.disabled(model): ...``: the model without its adapters, bit for bit the base model.

    Every adapted layer runs its base layer alone: those of ``dorac.nn`` and, under :func:`dorac.peft.enable`, PEFT's
    (whose modules_to_save keep their originals). Nothing is copied, gradients stay as they are, cached norms too.
    Blocks may be nested and may overlap, as those of several threads do: the adapters, which all threads see switched
    off, come back with the end of the last one. Whatever is raised in one, the model leaves it as it came. Compiled
    code has a second graph for this, which is kept. Copies that are made in the block have their adapters switched on.

    A merged layer is unmerged for the block, to ``2 eps * max(|V|, |W|)`` of the base weight (a quantised one exactly),
    and put back afterwards, bit for bit: what merging wrote is kept meanwhile.

    Into a layer that began as a part of its base weight (PiSSA, OLoRA, CorDA, LoRA-GA) that part is put back for the
    block, to a rounding of the base weight; PEFT leaves it out.

    For a reference model that is a module of its own see :func:`base_model`.

    Raises:
        ValueError: no adapter in the model; a merged layer that cannot be unmerged.

    Warns:
        RuntimeWarning: names what :func:`dorac.apply_dora` trains whole (``modules_to_save``): it runs as trained.
    """
    model = bare(model)
    layers, tuners = dict.fromkeys(dora_layers(model).values()), _tuners(model)
    if not layers and not tuners:
        raise ValueError(
            f"{type(model).__name__} holds no DoRA layer; wrap it with dorac.apply_dora first, or give a model of "
            "PEFT's to dorac.peft.enable"
        )
    _warn_trained_whole(model)
    held = _switch_off(model, list(layers), tuners)
    try:
        yield
    finally:
        # What the block may have set: modes, and which layers keep their norms.
        modes = [(module, module.training) for module in model.modules()]
        norms = [(layer, layer.kept) for layer in layers]
        _leave(held)
        for module, mode in modes:
            module.training = mode
        for layer, kept in norms:
            layer.kept = kept
            compiled_norm.tell(layer)


@dataclasses.dataclass(eq=False)
class _Off:
    """What was switched off together: the log of that, and how many blocks are in it."""

    log: Undo
    blocks: int = 1


_off: weakref.WeakKeyDictionary[nn.Module, _Off] = weakref.WeakKeyDictionary()  # by layer
_lock = threading.RLock()


def _switch_off(model: nn.Module, layers: list[DoraLayer], tuners: list[nn.Module]) -> list[_Off]:
    """Switches off what is not, and returns what one more block is in."""
    with _lock:
        held = list(dict.fromkeys(_off[module] for module in (*layers, *tuners) if module in _off))
        layers, tuners = ([module for module in modules if module not in _off] for modules in (layers, tuners))
        with Undo() as log:
            _unmerge(model, layers, tuners, log)
            for layer in layers:
                if residual.has_residual(layer):
                    residual.put_back(layer, log)
            for layer in layers:
                log.add(partial(layer.switch, layer.disabled))
                layer.switch(disabled=True)
            for module in tuners:
                log.add(partial(_set, vars(module), vars(module).get(_OFF)))
                _set(vars(module), True)
        for off in held:
            off.blocks += 1
        own = _Off(log)
        _off.update(dict.fromkeys((*layers, *tuners), own))
        return [*held, own]


def _leave(held: list[_Off]) -> None:
    """Switches on what no other block is in."""
    with _lock:
        for off in held:
            off.blocks -= 1
            if not off.blocks:
                for module in [module for module, its in _off.items() if its is off]:
                    del _off[module]
                off.log.roll_back()


_OFF = "_disable_adapters"  # where PEFT's layers have it; an older one is the class's


def _set(attributes: dict[str, object], off: bool | None) -> None:
    if off is None:
        attributes.pop(_OFF, None)
    else:
        attributes[_OFF] = off


def _tuners(model: nn.Module) -> list[nn.Module]:
    """What PEFT switches off in a model of its own, if that runs on dorac."""
    switch = sys.modules.get("dorac.peft.switch") if "peft" in sys.modules else None
    return [] if switch is None else switch.tuners(model)


def _unmerge(model: nn.Module, layers: list[DoraLayer], tuners: list[nn.Module], log: Undo) -> None:
    layers = [layer for layer in layers if layer.merged]
    if layers:
        reshard(model)
    for layer in layers:
        merging.decide_unmerge(layer)
    for layer in layers:
        merging.write_unmerged(layer, log)
    for layer in tuners:
        if layer.merged_adapters:
            from dorac.peft.merging import keep_layer

            keep_layer(log, layer)
            layer.unmerge()


def _warn_trained_whole(model: nn.Module) -> None:
    if saved := saved_modules(model):
        callers.warn(
            f"{', '.join(saved)}: trained whole (modules_to_save), with no base to go back to: without the adapters "
            "the model still has what was trained there",
        )


def base_model(model: nn.Module) -> nn.Module:
    """The model that ``model`` was before it was wrapped, as a module of its own over the same parameters.

    A reference model that takes no memory, for trainers that want one (``DPOTrainer(model, ref_model=...)`` of TRL): it
    has its own modules, so that its ``eval()``, hooks and patched forwards do not reach ``model``, and shares every
    parameter and buffer: it follows what is written to them (merging, too), but not another parameter that is put in
    the place of one (``load_state_dict(assign=True)``). It is made for one process or DDP; what shards parameters in
    place (FSDP, DeepSpeed) would shard them twice: use :func:`disabled` there.

    Raises:
        ValueError: no DoRA layer of ``dorac.nn`` in the model; a merged one, one that began as a part of its base
            weight.

    Warns:
        RuntimeWarning: as :func:`disabled`.
    """
    model = bare(model)
    layers = require_layers(model)
    for name, layer in layers.items():
        starts.settle(layer)
        if layer.merged:
            raise ValueError(f"{name or type(layer).__name__} is merged: unmerge it, the base model is not there now")
        if residual.has_residual(layer):
            raise ValueError(
                f"{name or type(layer).__name__} began as a part of its base weight, which is not there: use "
                "dorac.disabled, or load the adapter over the original weight"
            )
    _warn_trained_whole(model)
    shelves = [vars(module).get(SHELF_ATTRIBUTE, {}) for module in model.modules()]
    shelved = [adapter for shelf in shelves for adapter in shelf.values() if adapter is not None]
    others = [t for adapter in shelved for t in (*adapter.parameters(), *adapter.buffers())]
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers(), *others)}
    for layer in dict.fromkeys(layers.values()):
        memo[id(layer)] = copy.deepcopy(layer.base_layer, memo)
    plain = copy.deepcopy(model, memo)
    blocks.restore(plain.modules(), Undo())
    for module in plain.modules():
        vars(module).pop(SAVED_ATTRIBUTE, None)
        vars(module).pop(SHELF_ATTRIBUTE, None)
        loading.unguard(module)
    return plain


def set_strength(model: nn.Module, strength: float | Tensor) -> None:
    """Runs every adapter of ``model`` at a strength a: each adapted weight is ``W + a (W' - W)``.

    Of ``dorac.nn`` it sets ``layer.strength``; of PEFT's layers under :func:`dorac.peft.enable` it is ``set_scale`` of
    the active adapters, plain LoRA among them. No norm is taken anew and nothing is saved; ``set_strength(model, 1)``
    takes it back.

    Args:
        strength: a finite number, 0 for the base model bit for bit; of ``dorac.nn`` also a 0-d tensor, which may
            require a gradient.

    Raises:
        TypeError, ValueError: a strength that is none; no adapter in the model; a merged layer. Nothing changes then.
    """
    model = bare(model)
    layers, tuners = dora_layers(model), _tuners(model)
    if not tuners:
        require_layers(model)
    elif isinstance(checks.check_scaling(strength, "strength"), Tensor):
        raise TypeError("strength must be a number where PEFT's layers are to have it, got a tensor")
    with Undo() as log:
        for name, layer in layers.items():
            layer.keep_strength(log)
            try:
                layer.strength = strength
            except ValueError as error:
                raise ValueError(f"{name or type(layer).__name__}: {error}") from None
        for layer in tuners:
            scalings = getattr(layer, "scaling", ())  # none of what is trained whole
            for adapter in [name for name in scalings if name in layer.active_adapters]:
                if layer.merged:
                    raise ValueError("PEFT's adapters are merged: call unmerge_adapter() before setting their strength")
                log.add(partial(scalings.__setitem__, adapter, scalings[adapter]))
                layer.set_scale(adapter, strength)
