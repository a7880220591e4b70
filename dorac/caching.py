"""``cache_norms``: norms computed once per optimizer step instead of in every forward."""

import collections
import functools
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dorac import callers, ranks
from dorac.nn import DoraLayer, gathered, norm_cache, offloaded, starts
from dorac.nn.keeper import Keeper
from dorac.places import dora_layers
from dorac.wrapped import bare, reshard

_WRITTEN = (
    "the parameters of {} were written to between two steps of an optimizer by something else (an optimizer around the "
    "optimizer, sharpness-aware minimisation, an average of weights). Compiled code may have used a stale norm; from "
    "now on it takes its own, as without cache_norms. Call refresh() of the norm cache after such writes to undo that"
)


def cache_norms(model: nn.Module, *, debug: bool = False) -> "NormCache":
    """Keeps the norm of every DoRA layer of ``model`` from one optimizer step to the next; forward computes none.

    DoRA layers are those of ``dorac.nn`` and, each adapter with a norm of its own, those of PEFT under
    :func:`dorac.peft.enable`, over quantised base layers too.

    Results are the same, bit for bit wherever the norm is an op of its own (in eager, and compiled): forward reads what
    it would have computed. Gradient accumulation, activation checkpointing and inference pay for no norm.

    The norms are taken anew after the step of any ``torch.optim`` optimizer that holds parameters of theirs, after
    ``train()`` and ``eval()`` of such an optimizer (a schedule-free one), ``load_state_dict`` of a layer or of what
    holds it, :func:`dorac.load_adapter`, ``reset_parameters``, unmerging, setting a layer's ``scaling``, and moves and
    casts. Beside these

    - an eager forward takes the norm anew where its tensors were written to in place or replaced; after a ``train()``
      or ``eval()`` that changes the mode of the model, after a change of the grad mode and after an optimizer has
      stepped tensors that are no parameters (copies of some) it does so in any case, since writes through ``.data``
      leave no trace;
    - compiled code compares when it is compiled. After such a ``train()`` or ``eval()`` and an optimizer of copies it
      takes its own norm, in a graph of its own, until the next step, eager forward or ``refresh()``. Writes between the
      steps of an optimizer that leave a trace are found at its next step: a warning, and compiled code takes its own
      norm.

    Not noticed are writes through ``.data`` (an update of your own, an optimizer that is none of torch's, averages of
    weights) with none of these around them, and in compiled code whatever is written without one of them after it was
    compiled, between calls without an optimizer: call ``refresh()`` after such writes.

    Of layers that :mod:`dorac.parallel` has sharded each rank keeps its part of the norms, which takes a collective
    where columns are sharded: all ranks have to step, refresh and check alike.

    Where the parameters are not the layer's own (``torch.func.functional_call``, FSDP1), within a step that is given a
    closure, in exported and traced programs, and once a base weight requires a gradient, forward computes the norm as
    without a cache; so do copies and pickles of the model.

    In models of PEFT's ``set_peft_model_state_dict`` and ``load_adapter`` are such a ``load_state_dict``. A strength
    (``set_scale``, ``rescale_adapter_scale``) leaves the norms as they are. Adapters that are added later take their
    own norm. ``dorac.peft.disable(model)`` forgets the norms.

    Of several adapters of a model of ``dorac.nn`` each has its norms kept: :func:`dorac.set_adapter` takes none that is
    still right.

    Under FSDP2 (``fully_shard`` before this call) a norm is taken of the whole parameters in the first forward of its
    unit after a step, compiled or not, without a collective, and again where this rank's parts were written to. So it
    is under FSDP2 over :mod:`dorac.parallel`, with that one's collective where a weight is spread over its columns.

    Of a base weight that accelerate offloads to the host the norm is taken in the first forward after a step, while the
    weight is there, and again where the host's tensor was written to or replaced.

    Args:
        model: with DoRA layers, none of them cached already; trained or not, compiled before or afterwards.
        debug: every forward takes the norm and compares, in eager; with ``torch.compile(fullgraph=True)`` it raises.

    Returns:
        The :class:`NormCache`. It may be dropped: the norms stay cached.

    Raises:
        ValueError: no DoRA layer in the model; layers whose norms cannot be cached, by name with the reason (a base
            weight or the norm itself is trained; parameters that are offloaded to disk, or sharded otherwise than by
            :mod:`dorac.parallel` or FSDP2; a base weight of a format that is not known; cached already); under FSDP2,
            where every rank calls this, layers that are others on another rank. The model is then unchanged.
    """
    model = bare(model)
    reshard(model)
    layers: dict[str, Keeper] = dict(dora_layers(model))
    if (norms := sys.modules.get("dorac.peft.norms")) is not None:  # else no model runs on dorac.peft
        layers |= norms.adapter_norms(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no DoRA layer; wrap it with dorac.apply_dora first, or give a model of "
            "PEFT's to dorac.peft.enable"
        )
    units = gathered.by_unit(model, layers.values())
    in_units = {layer for of in units.values() for layer in of}
    shared = {name: layer for name, layer in layers.items() if layer in in_units and isinstance(layer, DoraLayer)}
    if shared:
        ranks.refuse_other_adapters(shared, ranks.mesh_of(t for layer in shared.values() for t in layer.norm_inputs()))
    return NormCache(layers, units, debug=debug)


class NormCache:
    """The cached norms of a model, made by :func:`cache_norms`. As a context manager it removes itself at the end.

    A copy or a pickle of it holds no layers, as a copy of the model holds no cached norms.
    """

    def __init__(
        self, layers: dict[str, Keeper], units: Mapping[nn.Module, Sequence[Keeper]] | None = None, *, debug: bool
    ) -> None:
        units = units or {}
        whole_in_forward = {layer for of in units.values() for layer in of}
        for layer in layers.values():
            if isinstance(layer, DoraLayer):
                starts.settle(layer)
        refused = {
            name or type(layer).__name__: norm_cache.uncacheable(layer, layer in whole_in_forward)
            for name, layer in layers.items()
        }
        refused = {name: reason for name, reason in refused.items() if reason}
        if refused:
            listed = "\n  ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"norms that cannot be cached:\n  {listed}")
        self._layers = weakref.WeakValueDictionary(layers)  # it may be kept longer than the model
        self._units = [weakref.ref(unit) for unit in units]
        self._hooks: list[RemovableHandle] = []
        try:
            norm_cache.start(layers.values(), debug=debug)
            self._hooks += gathered.follow(units)
            _HOOKS.register()
        except BaseException:
            self.remove()
            raise

    def refresh(self) -> None:
        """Takes all norms anew: after writes to parameters that :func:`cache_norms` does not hear of."""
        layers = list(self._layers.values())
        norm_cache.trust(layers)
        norm_cache.refresh(layers)

    def check(self) -> None:
        """Recomputes every norm and compares. Waits for the device; under FSDP2 every rank calls this.

        Raises:
            RuntimeError: norms that a forward would use are not the present ones; the layers are named.
        """
        with gathered.whole(unit for unit in (ref() for ref in self._units) if unit is not None):
            stale = [name or type(layer).__name__ for name, layer in self._layers.items() if _is_stale(layer)]
        if stale:
            raise RuntimeError(norm_cache.STALE.format(", ".join(stale)))

    def remove(self) -> None:
        """Lets forward compute the norms again; a second call does nothing."""
        norm_cache.stop(self._layers.values())
        self._layers.clear()
        for hook in self._hooks:
            hook.remove()
        _HOOKS.leave()

    def __repr__(self) -> str:
        keepers = dict.fromkeys(self._layers.values())  # one that is held in several places has several names
        kinds = collections.Counter(type(getattr(keeper, "layer", keeper)).__name__ for keeper in keepers)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{type(self).__name__}({listed or 'removed, or its model is gone'})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple:
        return functools.partial(type(self), {}, debug=False), ()


def _is_stale(keeper: Keeper) -> bool:
    layer = keeper if isinstance(keeper, DoraLayer) else keeper.layer
    if layer is None:
        return False
    with offloaded.norms_of(keeper, layer):
        return norm_cache.is_stale(keeper)


class _StepHooks:
    """The two hooks of torch's optimizers, one pair for all caches, there from the first cache to the last's removal.

    Models that are dropped leave ``kept_layers`` by themselves. The hooks stay until the next removal: taking them away
    where a model is collected could be in the middle of a walk over the hooks.
    """

    def __init__(self) -> None:
        self.handles: list = []
        self.lock = threading.Lock()

    def register(self) -> None:
        with self.lock:
            if self.handles:
                return
            # They read ids, which does not trace; the graph of a compiled step breaks around the update in any case.
            before, after = torch.compiler.disable(_before_step), torch.compiler.disable(_after_step)
            self.handles.append(register_optimizer_step_pre_hook(before))  # one by one: an exception leaves none behind
            self.handles.append(register_optimizer_step_post_hook(after))

    def leave(self) -> None:
        with self.lock:
            if not norm_cache.kept_layers:
                for handle in self.handles:
                    handle.remove()
                self.handles = []


_HOOKS = _StepHooks()


def _stepped(optimizer: Optimizer) -> list[Keeper]:
    """The layers of which the optimizer holds what the norm is taken of."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [layer for layer in norm_cache.keeping() if not held.isdisjoint(map(id, _depends_on(layer)))]


def _depends_on(layer: Keeper) -> tuple[Tensor, ...]:
    """The parameters of the layer's norm, of which FSDP2 may have put others in their place."""
    kept = layer.kept
    gathered = None if kept is None else kept.gathered
    return layer.norm_inputs() if gathered is None else (*layer.norm_inputs(), *gathered.tensors)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    traced = set(filter(norm_cache.traced, norm_cache.keeping()))
    if closure is None and not traced:
        return
    layers = _stepped(optimizer)
    written = [layer for layer in layers if layer in traced and norm_cache.written_since(layer)]
    if written:
        callers.warn(_WRITTEN.format(f"{len(written)} DoRA layers"), UserWarning)
        norm_cache.distrust(written)
    if closure is not None:  # it may run the model between two changes of the parameters
        norm_cache.suspend(layers)


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not norm_cache.kept_layers:
        return
    layers = _stepped(optimizer)
    norm_cache.refresh(layers)
    if layers and all(callable(getattr(optimizer, mode, None)) for mode in _MODES):
        _follow_modes(optimizer)
    if any(not isinstance(p, nn.Parameter) for group in optimizer.param_groups for p in group["params"]):
        # Copies, as of flat or float32 parameters: who stepped them writes them to the model when this is over.
        others = set(norm_cache.keeping()).difference(layers)
        norm_cache.doubt(layer for layer in others if any(t.requires_grad for t in layer.norm_inputs()))


_MODES = ("train", "eval")


def _follow_modes(optimizer: Optimizer) -> None:
    """Refreshes after ``train()`` and ``eval()`` of a schedule-free optimizer, which write the parameters."""
    for mode in _MODES:
        method = getattr(optimizer, mode)
        if hasattr(method, "refreshes_norms"):
            continue

        @functools.wraps(method)
        def followed(*args: object, method=method, **kwargs: object) -> object:
            result = method(*args, **kwargs)
            norm_cache.refresh(_stepped(optimizer))
            return result

        followed.refreshes_norms = True
        setattr(optimizer, mode, followed)
