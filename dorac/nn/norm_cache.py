"""The norm of a layer, kept between the steps that change it.

Switched on by :func:`dorac.cache_norms`, a layer has its norm in ``kept``. What is known to change what the norm
depends on ends in :func:`refresh`, which takes it anew and writes it in place: a captured CUDA graph reads the same
memory, and nothing recompiles. :func:`known_norm` gives a forward the norm only where it is that of the tensors the
forward uses; everywhere else the forward takes its own, as without a cache.

Other writes are looked for where the host runs. An eager forward compares where its tensors lie and their versions with
those that the norm was taken of (:mod:`~dorac.nn.moments`), and takes it anew after any difference. A write through
``.data`` leaves no trace in either, so the norm is *in doubt* after what such writes come with: train() and eval(), an
optimizer that steps copies. An eager forward in doubt takes it anew; compiled code may not write to the layer (a region
of activation checkpointing would refuse) and has a second graph, which takes its own norm until a refresh.

The norm is no buffer: DDP would broadcast it in every forward, FSDP cast it, an average of weights average it.

Another thread may remove a cache at any time: who uses ``layer.kept`` reads it once, and goes by what it read.
"""

import operator
import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dorac import packed
from dorac.nn import compiled_norm
from dorac.nn.compiled_norm import DICTIONARIES_TELL, CompiledNorm
from dorac.nn.keeper import Keeper, KeptNorm
from dorac.nn.moments import Moment, PackedMoment, plainly
from dorac.nn.present_norms import present_norms
from dorac.ops import front, sharded
from dorac.ops.packed_product import Held

STALE = (
    "the cached norm of {} is stale: its weight, factors or scaling changed by other means than an optimizer's step, "
    "load_state_dict or load_adapter; call refresh() of the norm cache after such a change"
)
# The layers with a cache: what the hooks of optimizers walk, and how tracing finds the layer of a norm. In the order in
# which they came, not in a set's: ranks take the norms of several layers in one collective.
kept_layers: weakref.WeakKeyDictionary[Keeper, None] = weakref.WeakKeyDictionary()
_changing = threading.Lock()  # whoever adds to it, takes from it or walks over it
_layer_of_norm: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(layer: Keeper | None, base: nn.Module, norm: Tensor | None) -> Held | packed.Packed | None:
    """The packed weight of ``base`` in the forward whose norm is ``norm``; None for another one.

    Where that is the norm that the layer keeps, the weight is that of the last forward, and not looked at again.
    """
    if torch.compiler.is_compiling():
        return packed.of(base)
    kept = None if norm is None or layer is None else layer.kept
    moment = None if kept is None or norm is not kept.norm else kept.at
    if type(moment) is not PackedMoment:
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
    if layer.kept is not None:
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
            layer.kept = KeptNorm(debug)
            enlist(layer)
        refresh(layers)
    except BaseException:
        stop(layers)
        raise


def stop(layers: Iterable[Keeper]) -> None:
    """Forgets the norms of these layers."""
    for layer in layers:
        layer.kept = None
        compiled_norm.tell(layer)
        with _changing:
            kept_layers.pop(layer, None)


def enlist(layer: Keeper) -> None:
    """Adds a layer that keeps its norm to those that :func:`keeping` lists."""
    with _changing:
        kept_layers[layer] = None


def keeping() -> list[Keeper]:
    """The layers with a cache now, in an order that is the same on every rank."""
    with _changing:
        return list(kept_layers)


def kept_norm(layer: Keeper) -> Tensor | None:
    """The norm that is kept, whether a forward may use it or not."""
    kept = layer.kept
    return None if kept is None else kept.norm


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
    kept = layer.kept
    if kept is None or kept.gathered is None:
        return False
    inputs = layer.norm_inputs()
    tensors = inputs if out_of_reach(layer, inputs) else kept.gathered.tensors
    kept.of, kept.gathered = None, kept.gathered.of(tensors, taken=False)
    compiled_norm.tell(layer)
    return True


def take(layers: Sequence[Keeper], *, seen_by_autograd: bool, grad_mode: bool | None = None) -> None:
    """As :func:`refresh`, whoever is to take them.

    Args:
        seen_by_autograd: False for a norm that is the same as ever: it may be written while a graph holds it.
    """
    taken = []
    try:
        for layer in layers:
            if (kept := layer.kept) is None:
                continue
            tensors = layer.norm_inputs()
            if layer.merged or out_of_reach(layer, tensors) or any(t.is_meta for t in tensors):
                kept.of = None
                compiled_norm.tell(layer)
            else:
                taken.append((layer, kept, tensors))
        if not taken:
            return
        _write(taken, present_norms([layer for layer, *_ in taken]), seen_by_autograd)
        for layer, kept, tensors in taken:
            _note(layer, kept, tensors, grad_mode)
    except BaseException:
        suspend(layers)
        raise


def _write(taken: list[tuple[Keeper, KeptNorm, tuple]], norms: list[Tensor], seen_by_autograd: bool) -> None:
    """In place, in one launch for all layers; where it does not fit, into memory of its own."""
    old, new = [], []
    for (layer, kept, _), norm in zip(taken, norms, strict=True):
        cached = kept.norm
        if cached is not None and (cached.shape, cached.dtype, cached.device) == (norm.shape, norm.dtype, norm.device):
            old.append(cached if seen_by_autograd else cached.data)
            new.append(norm)
            continue
        with torch.inference_mode(False):  # a tensor made in inference mode could never be saved for backward
            kept.norm = norm.clone()
        if not torch.compiler.is_compiling():
            kept.norm = nn.Parameter(kept.norm, requires_grad=False)  # see compiled_norm
            torch._dynamo.mark_static_address(kept.norm)  # CUDA graphs need not copy it
            _layer_of_norm[kept.norm] = weakref.ref(layer)
    if old:
        torch._foreach_copy_(old, new)


def _note(layer: Keeper, kept: KeptNorm, tensors: tuple[Tensor, ...], grad_mode: bool | None) -> None:
    earlier = kept.at
    if grad_mode is None and earlier is not None:
        grad_mode = earlier.grad_mode
    if torch.compiler.is_compiling():  # the host sees no tensors: the first eager forward takes the norm anew
        moment = None
    elif kept.gathered is not None:
        moment = kept.gathered.moment(tensors, grad_mode)
    elif (base := layer.packed_base()) is None:
        moment = Moment(tensors, grad_mode)
    else:
        moment = PackedMoment(tensors, grad_mode, base, earlier)
    kept.of, kept.scaling, kept.at, kept.in_doubt = (*tensors, kept.norm), layer.scaling, moment, kept.distrusted
    compiled_norm.tell(layer)


def suspend(layers: Iterable[Keeper]) -> None:
    """Lets every forward take its own norm until the next :func:`refresh`."""
    for layer in layers:
        if (kept := layer.kept) is not None:
            kept.of = kept.shelved = None
            compiled_norm.tell(layer)


def doubt(layers: Iterable[Keeper]) -> None:
    """An eager forward takes these norms anew, and compiled code its own until the next :func:`refresh`."""
    for layer in layers:
        if (kept := layer.kept) is not None:
            kept.at = kept.shelved = None
            kept.in_doubt = True
            compiled_norm.tell(layer)


def distrust(layers: Iterable[Keeper]) -> None:
    """Compiled code takes its own norm from the next :func:`refresh` on; :func:`trust` ends that."""
    for layer in layers:
        if (kept := layer.kept) is not None:
            kept.distrusted = True


def trust(layers: Iterable[Keeper]) -> None:
    """Compiled code uses the norm of the next :func:`refresh`."""
    for layer in layers:
        if (kept := layer.kept) is not None:
            kept.distrusted = False


def known_norm(layer: Keeper, inputs: tuple[Tensor, ...] | None = None) -> Tensor | None:
    """The cached norm if a forward may use it, else None; checked first where the layer asks for that.

    ``inputs``: the layer's ``norm_inputs()``, for who has them at hand.
    """
    if torch.compiler.is_compiling():
        if not DICTIONARIES_TELL and layer.kept is None:
            return None
        told = layer.compiled_norm
        if told is None or layer.norm_grad:
            return None
        return known_to_compiled(told, layer.norm_inputs() if inputs is None else inputs, layer._scaling)
    return known_in_eager(layer, inputs)


def known_in_eager(
    layer: Keeper, inputs: tuple[Tensor, ...] | None = None, scaling: float | Tensor | None = None
) -> Tensor | None:
    """As :func:`known_norm`, of a forward that nothing compiles; ``scaling``: the layer's, for who has it at hand."""
    kept = layer.kept
    if kept is None:
        return None
    if scaling is None:
        scaling = layer._scaling
    with plainly():
        if front.traced_by_jit() or not _usable(layer, kept, scaling, inputs):
            return None
    # After a break of the graph it would be compiled by itself.
    verified = torch.compiler.disable(_verified) if kept.debug else _verified
    if not verified(layer, kept):
        return None
    if kept.debug:
        _check(layer)
    return kept.norm


def known_to_compiled(told: CompiledNorm, inputs: tuple[Tensor, ...], scaling: float | Tensor) -> Tensor | None:
    """As :func:`known_norm`, of what compiled code is told."""
    if isinstance(scaling, Tensor) or front.exporting_module():
        return None
    for weight in inputs[: len(inputs) // 3]:  # as _usable()
        if weight.requires_grad:
            return None
    for tensor, of in zip(inputs, told.of, strict=True):
        if tensor is not of:
            return None
    _verify_while_tracing(told.norm)
    if told.debug:  # breaks the graph, or says why where that is not allowed
        raise RuntimeError("cache_norms(debug=True) compares in eager only: compile without fullgraph, or use check()")
    return told.norm


def _verified(layer: Keeper, kept: KeptNorm) -> bool:
    """Whether the norm is that of the present values, as far as the host can tell; an eager forward sees to it."""
    moment = kept.at
    if moment is not None:
        with plainly():
            lasts = not (moment.is_shared or moment.passed(kept.of))
        if lasts and not moment.in_other_grad_mode():
            return True
    if front.under_transform() or front.capturing():  # what they would compute now is not what is to be kept
        return False
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        take([layer], seen_by_autograd=False, grad_mode=grad_mode)
    return layer.kept is kept  # else nothing was taken, or by somebody else


def _verify_while_tracing(norm: Tensor) -> None:
    """Looks at the tensors when the code that uses the norm is compiled: the last time that the host sees them.

    This is where what DDP broadcast at its construction is noticed.
    """
    if norm not in _layer_of_norm:  # a norm that was taken in traced code
        return
    layer = _layer_of_norm[norm]()
    kept = layer.kept
    if kept is None:
        return
    kept.traced = True
    if written_since(layer):
        with torch.no_grad():
            take([layer], seen_by_autograd=False)


def traced(layer: Keeper) -> bool:
    """Whether compiled code uses the norm."""
    kept = layer.kept
    return kept is not None and kept.traced and not kept.in_doubt


def written_since(layer: Keeper) -> bool:
    """Whether the host sees that the tensors were written to after the norm was taken of them."""
    kept = layer.kept
    if kept is None:
        return False
    with plainly():
        return kept.of is not None and kept.at is not None and kept.at.passed(kept.of)


def is_stale(layer: Keeper) -> bool:
    """Whether a forward would use a norm that is not the present one. Waits for the device."""
    kept = layer.kept
    if layer.merged or kept is None or not _usable(layer, kept, layer._scaling):
        return False
    if (kept.at is None and kept.in_doubt) or kept.scaling != layer.scaling:
        return False  # no forward would use it
    if kept.gathered is not None and kept.gathered.passed():
        return False  # its unit will take it anew
    (norm,) = present_norms([layer])
    # Two orders of one sum differ by less; so does a step too small to be seen in the output.
    rounding = 8 * torch.finfo(norm.dtype).eps
    return not torch.allclose(kept.norm.to(norm.dtype), norm, rtol=rounding, atol=0, equal_nan=True)


def _usable(layer: Keeper, kept: KeptNorm, scaling: float | Tensor, inputs: tuple[Tensor, ...] | None = None) -> bool:
    """Whether the cached norm is that of the tensors which stand in the layer now.

    It is not where others stand in the place of the layer's own (``functional_call``, a replica, a parametrisation),
    nor where a base weight is trained or the scaling is a tensor, which may change unseen. An exported program takes
    its own norm, since nobody would refresh it there, and so does a traced one.
    """
    of = kept.of
    if of is None or layer.norm_grad or isinstance(scaling, Tensor) or front.exporting_module():
        return False
    if inputs is None:
        inputs = layer.norm_inputs()
    for weight in inputs[: len(inputs) // 3]:  # the factors follow
        if weight.requires_grad:
            return False
    return all(map(operator.is_, inputs, of)) and kept.norm is of[-1]


def _check(layer: Keeper) -> None:
    with torch.no_grad():
        if is_stale(layer):
            raise RuntimeError(STALE.format(type(layer).__name__ if isinstance(layer, nn.Module) else layer))
