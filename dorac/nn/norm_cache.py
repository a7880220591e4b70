"""The norm of a layer, kept between the steps that change it.

Switched on by :func:`dorac.cache_norms`, a layer has its norm in ``cached_norm``. What is known to change what the norm
depends on ends in :func:`refresh`, which takes it anew and writes it in place: a captured CUDA graph reads the same
memory, and nothing recompiles. :func:`known_norm` gives a forward the norm only where it is that of the tensors the
forward uses; everywhere else the forward takes its own, as without a cache.

Other writes are looked for where the host runs. An eager forward compares where its tensors lie and their versions with
those that the norm was taken of (:mod:`~dorac.nn.moments`), and takes it anew after any difference. A write through
``.data`` leaves no trace in either, so the norm is *in doubt* after what such writes come with: train() and eval(), an
optimizer that steps copies. An eager forward in doubt takes it anew; compiled code may not write to the layer (a region
of activation checkpointing would refuse) and has a second graph, which takes its own norm until a refresh.

``cached_norm`` is no buffer: DDP would broadcast it in every forward, FSDP cast it, an average of weights average it.
"""

import operator
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dorac import checks, packed
from dorac.nn.keeper import NOTHING_KEPT, Keeper
from dorac.nn.moments import Moment, PackedMoment, plainly
from dorac.ops import front, sharded
from dorac.ops.norm import row_norms
from dorac.ops.packed_product import Held

STALE = (
    "the cached norm of {} is stale: its weight, factors or scaling changed by other means than an optimizer's step, "
    "load_state_dict or load_adapter; call refresh() of the norm cache after such a change"
)
# The layers with a cache: what the hooks of optimizers walk, and how tracing finds the layer of a norm.
kept_layers: weakref.WeakSet[Keeper] = weakref.WeakSet()
_layer_of_norm: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(layer: Keeper | None, base: nn.Module, norm: Tensor | None) -> Held | packed.Packed | None:
    """The packed weight of ``base`` in the forward whose norm is ``norm``; None for another one.

    Where that is the norm that the layer keeps, the weight is that of the last forward, and not looked at again.
    """
    moment = None if norm is None or layer is None or norm is not layer.cached_norm else layer.cached_at
    if type(moment) is not PackedMoment or torch.compiler.is_compiling():
        return packed.of(base)
    pieces = moment.pieces
    if pieces.held is None:
        pieces.held = Held(packed.of(base))
    return pieces.held


SHARDED = (
    "its parameters are sharded (DTensor) otherwise than by dorac.parallel alone, and no unit of fully_shard in this "
    "model gathers them whole"
)


def uncacheable(layer: Keeper, whole_in_forward: bool = False) -> str | None:
    """Why the norm of this layer cannot be cached, or None if it can.

    Args:
        whole_in_forward: whether parameters that are sharded are whole in the forward of a unit of FSDP2's.
    """
    if layer.caches_norm:
        return "it is cached already; remove() that cache first"
    reason = layer.cannot_cache
    if reason and not (whole_in_forward and reason == SHARDED):
        return reason
    if any(weight.requires_grad for weight in layer.base_weights()):
        return "its base weight is trained: freeze it, a norm is kept for weights that only the adapter changes"
    if layer.norm_grad:
        return "its norm_grad is set: a norm that carries a gradient belongs to one forward"
    if not whole_in_forward and out_of_reach(layer, layer.norm_inputs()):
        return SHARDED
    return None


def out_of_reach(layer: Keeper, tensors: Sequence[Tensor]) -> bool:
    """Whether the layer's forward will not have these tensors: DTensors, but those of tensor parallelism alone."""
    shards = getattr(layer, "shards", None)
    return sharded.any_sharded(*tensors) and (shards is None or not shards.holds(tensors))


@torch.no_grad()
def start(layers: Iterable[Keeper], *, debug: bool) -> None:
    """Caches the norms of these layers from now on; ``debug``: checks them in every forward."""
    torch.compiler.assume_constant_result(_verify_while_tracing)  # here: it imports the compiler
    try:
        for layer in layers:
            vars(layer).update(NOTHING_KEPT, caches_norm=True, check_cached_norm=debug)
            kept_layers.add(layer)
        refresh(layers)
    except BaseException:
        stop(layers)
        raise


def stop(layers: Iterable[Keeper]) -> None:
    """Forgets the norms of these layers."""
    for layer in layers:
        vars(layer).update(NOTHING_KEPT)
        kept_layers.discard(layer)


@torch.no_grad()
def refresh(layers: Iterable[Keeper]) -> None:
    """Takes the cached norms of these layers anew; that of a merged layer when it is unmerged.

    A layer that has been sharded since takes its own from then on; so do all of them until the next refresh if this one
    does not come to its end. That of an offloaded layer is taken in its next forward, that of one in FSDP2 in its
    unit's.
    """
    take([layer for layer in layers if not _taken_by_unit(layer)], seen_by_autograd=True)


def _taken_by_unit(layer: Keeper) -> bool:
    """Whether the next forward of a unit of FSDP2's is to take the norm, which ends here."""
    if layer.gathered is None:
        return False
    inputs = layer.norm_inputs()
    tensors = inputs if out_of_reach(layer, inputs) else layer.gathered.tensors
    layer.cached_of, layer.gathered = None, layer.gathered.of(tensors, taken=False)
    return True


def take(layers: Iterable[Keeper], *, seen_by_autograd: bool, grad_mode: bool | None = None) -> None:
    """As :func:`refresh`; a norm that is the same as ever may be written while a graph holds it, unseen by autograd."""
    taken = []
    layers = [layer for layer in layers if layer.caches_norm]
    if not layers:
        return
    try:
        for layer in layers:
            tensors = layer.norm_inputs()
            if layer.merged or out_of_reach(layer, tensors) or any(t.is_meta for t in tensors):
                layer.cached_of = None
            else:
                taken.append((layer, tensors))
        _write(taken, _norms([layer for layer, _ in taken]), seen_by_autograd)
        for layer, tensors in taken:
            _note(layer, tensors, grad_mode)
    except BaseException:
        suspend(layers)
        raise


def _write(taken: list[tuple[Keeper, tuple]], norms: list[Tensor], seen_by_autograd: bool) -> None:
    """In place, in one launch for all layers; where it does not fit, into memory of its own."""
    old, new = [], []
    for (layer, _), norm in zip(taken, norms, strict=True):
        cached = layer.cached_norm
        if cached is not None and (cached.shape, cached.dtype, cached.device) == (norm.shape, norm.dtype, norm.device):
            old.append(cached if seen_by_autograd else cached.data)
            new.append(norm)
            continue
        with torch.inference_mode(False):  # a tensor made in inference mode could never be saved for backward
            layer.cached_norm = norm.clone()
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(layer.cached_norm)  # CUDA graphs need not copy it
            _layer_of_norm[layer.cached_norm] = weakref.ref(layer)
    if old:
        torch._foreach_copy_(old, new)


def _note(layer: Keeper, tensors: tuple[Tensor, ...], grad_mode: bool | None) -> None:
    of = *tensors, layer.cached_norm
    if torch.compiler.is_compiling():  # the host sees no tensors: the first eager forward takes the norm anew
        layer.cached_of, layer.cached_at, layer.norm_in_doubt = of, None, layer.norm_distrusted
        layer.cached_scaling = layer.scaling
        return
    if grad_mode is None and layer.cached_at is not None:
        grad_mode = layer.cached_at.grad_mode
    if layer.gathered is not None:
        moment = layer.gathered.moment(tensors, grad_mode)
    elif (base := layer.packed_base()) is None:
        moment = Moment(tensors, grad_mode)
    else:
        moment = PackedMoment(tensors, grad_mode, base, layer.cached_at)
    vars(layer).update(  # setattr is slow
        cached_of=of, cached_scaling=layer.scaling, cached_at=moment, norm_in_doubt=layer.norm_distrusted
    )


def _norms(layers: list[Keeper]) -> list[Tensor]:
    """The present norms, those of layers of one layout in one launch; of a tensor-parallel layer this rank's rows."""
    scalings = [layer.scaling for layer in layers]
    spread = [getattr(layer, "shards", None) for layer in layers]
    operands = [
        None if isinstance(scaling, Tensor) else (shards.local_operands(layer) if shards else layer.norm_operands())
        for layer, scaling, shards in zip(layers, scalings, spread, strict=True)
    ]
    checked = set()
    for tensors, scaling in zip(operands, scalings, strict=True):
        if tensors is None:
            continue
        checks.check_scaling(scaling)
        if torch.compiler.is_compiling():
            checks.check_factors(*tensors)
            continue
        metadata = tuple([(type(t), t.shape, t.dtype, t.device) for t in tensors])  # all that the check looks at
        if metadata not in checked:
            checks.check_factors(*tensors)
            checked.add(metadata)
    together = row_norms(operands, scalings, [layer.norm_budget for layer in layers])
    norms = [
        norm if norm is not None else shards.local_norm(layer) if shards else layer._norm()
        for layer, norm, shards in zip(layers, together, spread, strict=True)
    ]
    if any(spread):
        from dorac.nn.tensor_parallel import total_norms  # which imports torch.distributed

        norms = total_norms(spread, norms)
    return norms


def suspend(layers: Iterable[Keeper]) -> None:
    """Lets every forward take its own norm until the next :func:`refresh`."""
    for layer in layers:
        layer.cached_of = layer.shelved_norms = None


def doubt(layers: Iterable[Keeper]) -> None:
    """An eager forward takes these norms anew, and compiled code its own until the next :func:`refresh`."""
    for layer in layers:
        if layer.caches_norm:
            layer.cached_at = layer.shelved_norms = None
            layer.norm_in_doubt = True


_OF_ADAPTER = ("cached_norm", "cached_of", "cached_scaling", "cached_source", "cached_at")


def shelve(layer: Keeper, adapter: str) -> None:
    """Puts the norm of the active adapter away, under its name, for :func:`unshelve`; the layer has none then."""
    if not layer.caches_norm:
        return
    kept = {name: getattr(layer, name) for name in _OF_ADAPTER}
    if kept["cached_of"] is not None and kept["cached_at"] is not None and not layer.norm_in_doubt:
        layer.shelved_norms = (layer.shelved_norms or {}) | {adapter: kept}
    vars(layer).update({name: NOTHING_KEPT[name] for name in _OF_ADAPTER})


def unshelve(layer: Keeper, adapter: str) -> bool:
    """Brings back the norm of an adapter that has become active; whether it still is that of its tensors."""
    kept = (layer.shelved_norms or {}).get(adapter)
    if kept is None:
        return False
    layer.shelved_norms = {name: other for name, other in layer.shelved_norms.items() if name != adapter}
    vars(layer).update(kept)  # a norm that has passed is written anew in the same memory
    *of, _ = layer.cached_of
    inputs = layer.norm_inputs()
    same = len(of) == len(inputs) and all(map(operator.is_, inputs, of)) and layer.cached_scaling == layer.scaling
    with plainly():
        return same and not layer.cached_at.passed(layer.cached_of)


def known_norm(
    layer: Keeper, inputs: tuple[Tensor, ...] | None = None, scaling: float | Tensor | None = None
) -> Tensor | None:
    """The cached norm if a forward may use it, else None; checked first where the layer asks for that.

    ``inputs``, ``scaling``: the layer's ``norm_inputs()`` and its scaling, for who has them at hand.
    """
    if not layer.caches_norm:
        return None
    if scaling is None:
        scaling = layer._scaling
    if torch.compiler.is_compiling():
        if not _usable(layer, scaling, inputs) or layer.norm_in_doubt:
            return None
        _verify_while_tracing(layer.cached_norm)
    else:
        with plainly():
            if not _usable(layer, scaling, inputs):
                return None
        if not layer.check_cached_norm:
            if not _verified(layer):
                return None
        elif not torch.compiler.disable(_verified)(layer):  # after a break of the graph it would be compiled by itself
            return None
    if layer.check_cached_norm:
        _check(layer)
    return layer.cached_norm


def _verified(layer: Keeper) -> bool:
    """Whether the norm is that of the present values, as far as the host can tell; an eager forward sees to it."""
    moment = layer.cached_at
    if moment is not None:
        with plainly():
            lasts = not moment.passed(layer.cached_of)
        if lasts and not moment.in_other_grad_mode():
            return True
    if front.under_transform() or front.capturing():  # what they would compute now is not what is to be kept
        return False
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        take([layer], seen_by_autograd=False, grad_mode=grad_mode)
    return True


def _verify_while_tracing(norm: Tensor) -> None:
    """Looks at the tensors when the code that uses the norm is compiled: the last time that the host sees them.

    This is where what DDP broadcast at its construction is noticed.
    """
    if norm not in _layer_of_norm:  # a norm that was taken in traced code
        return
    layer = _layer_of_norm[norm]()
    layer.norm_traced = True
    if written_since(layer):
        with torch.no_grad():
            take([layer], seen_by_autograd=False)


def written_since(layer: Keeper) -> bool:
    """Whether the host sees that the tensors were written to after the norm was taken of them."""
    moment, of = layer.cached_at, layer.cached_of
    with plainly():
        return of is not None and moment is not None and moment.passed(of)


def is_stale(layer: Keeper) -> bool:
    """Whether a forward would use a norm that is not the present one. Waits for the device."""
    if layer.merged or not layer.caches_norm or not _usable(layer, layer._scaling):
        return False
    if (layer.cached_at is None and layer.norm_in_doubt) or layer.cached_scaling != layer.scaling:
        return False  # no forward would use it
    if layer.gathered is not None and layer.gathered.passed():
        return False  # its unit will take it anew
    (norm,) = _norms([layer])
    # Two orders of one sum differ by less; so does a step too small to be seen in the output.
    rounding = 8 * torch.finfo(norm.dtype).eps
    return not torch.allclose(layer.cached_norm.to(norm.dtype), norm, rtol=rounding, atol=0, equal_nan=True)


def _usable(layer: Keeper, scaling: float | Tensor, inputs: tuple[Tensor, ...] | None = None) -> bool:
    """Whether the cached norm is that of the tensors which stand in the layer now.

    It is not where others stand in the place of the layer's own (``functional_call``, a replica, a parametrisation),
    nor where a base weight is trained or the scaling is a tensor, which may change unseen. An exported program takes
    its own norm, since nobody would refresh it there.
    """
    of = layer.cached_of
    if of is None or layer.norm_grad or isinstance(scaling, Tensor) or front.exporting_module():
        return False
    if inputs is None:
        inputs = layer.norm_inputs()
    for weight in inputs[: len(inputs) // 3]:  # the factors follow
        if weight.requires_grad:
            return False
    return all(map(operator.is_, inputs, of)) and layer.cached_norm is of[-1]


def _check(layer: Keeper) -> None:
    if torch.compiler.is_compiling():  # breaks the graph, or says why where that is not allowed
        raise RuntimeError("cache_norms(debug=True) compares in eager only: compile without fullgraph, or use check()")
    with torch.no_grad():
        if is_stale(layer):
            raise RuntimeError(STALE.format(type(layer).__name__ if isinstance(layer, nn.Module) else layer))
