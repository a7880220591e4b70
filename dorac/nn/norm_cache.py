"""The norm of a layer, kept between the steps that change it.

Switched on by :func:`dorac.cache_norms`, a layer has its norm in the buffer ``cached_norm``. Whatever changes what the
norm depends on ends in :func:`refresh`, which takes the norm anew and writes it in place: a captured CUDA graph reads
the same memory, and nothing recompiles. :func:`known_norm` gives a forward the norm only where it is that of the
tensors the forward uses; everywhere else the forward takes its own, as without a cache.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dorac import checks
from dorac.ops import front, sharded
from dorac.ops.norm import row_norms

if TYPE_CHECKING:
    from dorac.nn.layer import DoraLayer


STALE = (
    "the cached norm of {} is stale: its weight, factors or scaling changed by other means than an optimizer's step, "
    "load_state_dict or load_adapter; call refresh() of the norm cache after such a change"
)


def uncacheable(layer: "DoraLayer") -> str | None:
    """Why the norm of this layer cannot be cached, or None if it can."""
    if layer.caches_norm:
        return "it is cached already; remove() that cache first"
    if any(weight.requires_grad for weight in layer.base_weights()):
        return "its base weight is trained: freeze it, a norm is kept for weights that only the adapter changes"
    if layer.norm_grad:
        return "its norm_grad is set: a norm that carries a gradient belongs to one forward"
    if sharded.any_sharded(*layer.norm_inputs()):
        return "its parameters are sharded (DTensor)"
    return None


@torch.no_grad()
def start(layers: Iterable["DoraLayer"], *, debug: bool) -> None:
    """Caches the norms of these layers from now on; ``debug``: checks them in every forward."""
    for layer in layers:
        layer.caches_norm = True
        layer.check_cached_norm = debug
    refresh(layers)


def stop(layers: Iterable["DoraLayer"]) -> None:
    """Forgets the norms of these layers."""
    for layer in layers:
        layer.caches_norm = False
        layer.cached_norm = layer.cached_of = None


@torch.no_grad()
def refresh(layers: Iterable["DoraLayer"]) -> None:
    """Takes the cached norms of these layers anew; that of a merged layer when it is unmerged.

    A layer that has been sharded since takes its own from then on.
    """
    pairs, taken = [], []
    for layer in layers:
        if not layer.caches_norm:
            continue
        layer.cached_of = None  # until all norms are written: an exception in between leaves none that is stale
        if not layer.merged and not sharded.any_sharded(*layer.norm_inputs()):
            taken.append(layer)
    for layer, norm in zip(taken, _norms(taken), strict=True):
        if _like(layer.cached_norm, norm):
            pairs.append((layer.cached_norm, norm))
        else:
            with torch.inference_mode(False):  # a tensor made in inference mode could never be saved for backward
                layer.cached_norm = norm.clone()
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # one launch for all layers
    for layer in taken:
        layer.cached_of = _identity(layer)


def _norms(layers: list["DoraLayer"]) -> list[Tensor]:
    """The present norms, those of layers of one layout in one launch."""
    operands = [None if isinstance(layer.scaling, Tensor) else layer.norm_operands() for layer in layers]
    for layer, tensors in zip(layers, operands, strict=True):
        if tensors is not None:
            checks.check_factors(*tensors)
            checks.check_scaling(layer.scaling)
    together = row_norms(operands, [layer.scaling for layer in layers])
    return [layer._norm() if norm is None else norm for layer, norm in zip(layers, together, strict=True)]


def suspend(layers: Iterable["DoraLayer"]) -> None:
    """Lets every forward take its own norm until the next :func:`refresh`."""
    for layer in layers:
        layer.cached_of = None


def known_norm(layer: "DoraLayer") -> Tensor | None:
    """The cached norm if a forward may use it, else None; checked first where the layer asks for that."""
    if not _usable(layer):
        return None
    if layer.check_cached_norm:
        _check(layer)
    return layer.cached_norm


def is_stale(layer: "DoraLayer") -> bool:
    """Whether a forward would use a norm that is not the present one. Waits for the device."""
    if layer.merged or not _usable(layer):
        return False
    norm = layer._norm()
    # Two orders of one sum differ by less; so does a step too small to be seen in the output.
    rounding = 8 * torch.finfo(norm.dtype).eps
    return not torch.allclose(layer.cached_norm.to(norm.dtype), norm, rtol=rounding, atol=0, equal_nan=True)


def _usable(layer: "DoraLayer") -> bool:
    """Whether the cached norm is that of the present tensors, as far as refreshing sees to it.

    It is not where others stand in the place of the layer's own (``functional_call``, a replica, a parametrisation),
    nor where a base weight is trained or the scaling is a tensor, which may change unseen. An exported program takes
    its own norm, since nobody would refresh it there.
    """
    if layer.cached_of is None or layer.norm_grad or isinstance(layer.scaling, Tensor):
        return False
    if front.exporting_module() or any(weight.requires_grad for weight in layer.base_weights()):
        return False
    return all(mine is known for mine, known in zip(_identity(layer), layer.cached_of, strict=True))


def _identity(layer: "DoraLayer") -> tuple[Tensor, ...]:
    return *layer.norm_inputs(), layer.cached_norm


def _like(cached: Tensor | None, norm: Tensor) -> bool:
    return cached is not None and (cached.shape, cached.dtype, cached.device) == (norm.shape, norm.dtype, norm.device)


def _check(layer: "DoraLayer") -> None:
    if torch.compiler.is_compiling():  # breaks the graph, or says why where that is not allowed
        raise RuntimeError("cache_norms(debug=True) compares in eager only: compile without fullgraph, or use check()")
    with torch.no_grad():
        if is_stale(layer):
            raise RuntimeError(STALE.format(type(layer).__name__))
