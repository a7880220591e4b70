"""The start of an adapter whose base weight comes after it: g = 1 whatever the order of wrapping and loading.

A layer made on ``meta`` waits: it has no values until its base weight has some. It gets them (fresh factors, the
magnitude equal to the norm) where the base weight is loaded, at the latest in ``train()``, ``eval()``, ``to()``, the
first forward or when it is saved. A layer made over weights that are loaded later has a magnitude to be taken anew.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dorac import callers
from dorac.ops import sharded

if TYPE_CHECKING:
    from dorac.nn.layer import DoraLayer


@dataclasses.dataclass
class Loading:
    """What :func:`before_load` tells :func:`after_load`; an exception in between leaves it to be overwritten."""

    name: str = ""
    all: bool = False  # whether every parameter of the adapter is loaded,
    base: bool = False  # a base weight,
    magnitude: bool = False  # a magnitude, now or before
    norm: Tensor | None = None  # of the weight before, where its magnitude is not loaded
    follows: bool = False  # whether the magnitude was this norm


def wait(layer: "DoraLayer") -> None:
    """The adapter has no values from now on, until :func:`settle` or a load gives it some."""
    if layer.waiting is None:
        layer.waiting = layer.register_forward_pre_hook(_before_forward)


def has_values(layer: "DoraLayer", *, loaded: bool) -> None:
    """All of the adapter's values are there; loaded ones belong to a base weight that may still come."""
    layer.magnitude_loaded = loaded
    layer.emptied = False
    if layer.waiting is not None:
        layer.waiting.remove()
        layer.waiting = None


def after_reset(layer: "DoraLayer") -> None:
    """The values are there if the base weight has its own: a wrapper may be reset before its base layer."""
    layer.magnitude_loaded = False
    if layer.waiting is None:
        return
    if not _lacks_weight(layer):
        has_values(layer, loaded=False)
        return
    for magnitude in layer._magnitudes():
        magnitude.fill_(torch.nan)  # it is the norm of no values, which is inf


def _lacks_weight(layer: "DoraLayer") -> bool:
    return any(weight.is_meta or _is_unset(weight) for weight in layer.base_weights())


def _before_forward(layer: "DoraLayer", args: tuple) -> None:
    if any(weight.is_meta for weight in layer.base_weights()) or not _may_lack(layer):
        return
    if torch.compiler.is_compiling():  # breaks the graph, or says why where that is not allowed
        raise RuntimeError(
            f"{type(layer).__name__} was made on meta and has no values yet: call train() or eval() first"
        )
    if layer.emptied and layer.emptied_sharded and not sharded.any_sharded(*layer.base_weights()):
        raise RuntimeError(  # what is written to FSDP's gathered copies is lost
            f"{type(layer).__name__} was made on meta and has no values yet: call train() or eval() before the forward"
        )
    settle(layer)


def _may_lack(layer: "DoraLayer") -> bool:
    """Whether the tensors in the layer can lack values; not where ``functional_call`` has put others there."""
    if layer.emptied or any(p.is_meta for p in layer.parameters(recurse=False)):
        return True
    return _came_with_transformers(layer)


def _came_with_transformers(layer: "DoraLayer") -> bool:
    """Whether its ``from_pretrained`` has loaded the base weight, or initialised it where it is in no checkpoint.

    What else is in no checkpoint it leaves in whatever the memory held, without its mark.
    """
    loaded = any(getattr(weight, "_is_hf_initialized", False) for weight in layer.base_weights())
    return loaded or vars(layer).get("_is_hf_initialized", False)


@torch.no_grad()
def settle(layer: "DoraLayer") -> None:
    """Gives a waiting adapter the values that it lacks, if its base weight has its own."""
    if layer.waiting is None or _lacks_weight(layer):
        return
    marked = _came_with_transformers(layer)
    adapter = dict(layer.named_parameters(recurse=False))
    lacking = {
        name
        for name, p in adapter.items()
        if p.is_meta or _is_unset(p) or (marked and not getattr(p, "_is_hf_initialized", False))
    }
    present = {name: p.clone() for name, p in adapter.items() if name not in lacking}
    materialise(layer)
    magnitudes = {name for name in adapter if name.endswith("lora_magnitude_vector")}
    if lacking - magnitudes:
        layer._draw_factors()
        _restore(layer, present)
    if lacking & magnitudes:
        layer._reset_magnitudes()
        _restore(layer, present)
    has_values(layer, loaded=layer.magnitude_loaded)


def _restore(layer: "DoraLayer", present: Mapping[str, Tensor]) -> None:
    for name, tensor in present.items():
        getattr(layer, name).copy_(tensor)


def materialise(layer: "DoraLayer") -> None:
    """Puts empty parameters in the place of the adapter's on ``meta``, where the base weight is."""
    device = layer.weight.device
    for name, p in [*layer.named_parameters(recurse=False)]:
        if not p.is_meta or device.type == "meta":
            continue
        with torch.inference_mode(False):  # what is made in inference mode could never be trained
            setattr(layer, name, nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad))


def _is_unset(tensor: Tensor) -> bool:
    """Whether nobody has written to a tensor since :func:`after_move`."""
    return bool(sharded.whole(tensor.isnan().all())) if tensor.numel() else False


def before_move(layer: "DoraLayer") -> dict[str, Tensor] | None:
    """What :func:`after_move` needs: of a layer over a base weight on ``meta`` the values that the adapter has."""
    settle(layer)
    if not any(weight.is_meta for weight in layer.base_weights()):
        return None
    return {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False) if not p.is_meta}


@torch.no_grad()
def after_move(layer: "DoraLayer", before: dict[str, Tensor] | None) -> None:
    """After ``to_empty``: what had no values is NaN, which nobody takes for values; the others have theirs again."""
    weights = layer.base_weights()
    if before is None or any(weight.is_meta for weight in weights):
        return
    adapter = dict(layer.named_parameters(recurse=False))
    for tensor in [*weights, *(p for name, p in adapter.items() if name not in before)]:
        tensor.fill_(torch.nan)
    _restore(layer, before)
    wait(layer)
    layer.emptied = True
    layer.emptied_sharded = sharded.any_sharded(*weights)


def _norm(layer: "DoraLayer") -> Tensor:
    return sharded.whole(layer._norm())


def _is_at_norm(layer: "DoraLayer", norm: Tensor) -> bool:
    magnitudes = [sharded.whole(m.detach()) for m in layer._magnitudes()]
    magnitude = magnitudes[0] if len(magnitudes) == 1 else torch.cat(magnitudes, dim=1)
    magnitude = magnitude.reshape(norm.shape)
    if _same(magnitude, norm):
        return True
    # A cast since it was taken has rounded the weight, and another device adds up in another order.
    close = torch.allclose(magnitude, norm.to(magnitude.dtype), rtol=2**-8, atol=0, equal_nan=True)
    return close and has_no_delta(layer)


@torch.no_grad()
def has_no_delta(layer: "DoraLayer") -> bool:
    """Whether ``lora_B @ lora_A`` is zero, in every matrix of the layer, because a factor is: nobody has trained it."""
    parameters = [getattr(layer, name) for name in layer.PEFT_KEYS]
    pairs = zip(parameters[0::3], parameters[1::3], strict=True)  # the third is the magnitude
    return all(any(not factor.is_meta and not sharded.whole(factor).any() for factor in pair) for pair in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@torch.no_grad()
def before_load(layer: "DoraLayer", state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Looks at what is loaded: a base weight without its magnitude makes this one follow, if nobody trained it."""
    weights = layer.base_weights()
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    loaded = {name for name in own if f"{prefix}{name}" in state_dict}
    arrives = any(f"{prefix}base_layer.{name}" in state_dict for name in layer.named_base_weights())
    magnitude = layer.magnitude_loaded or any(name.endswith("lora_magnitude_vector") for name in loaded)
    norm = None
    if arrives and not magnitude and layer.waiting is None and not any(weight.is_meta for weight in weights):
        norm = _norm(layer)
    follows = norm is not None and _is_at_norm(layer, norm)
    found = Loading(prefix.rstrip("."), len(loaded) == len(own), arrives, magnitude, norm, follows)
    vars(layer.loading).update(vars(found))


@torch.no_grad()
def after_load(layer: "DoraLayer") -> None:
    """What :func:`before_load` has seen to be necessary, and a warning where a trained magnitude got another weight."""
    loading = layer.loading
    if layer.magnitude_loaded != loading.magnitude:
        layer.magnitude_loaded = loading.magnitude
    if loading.all:
        has_values(layer, loaded=True)
    elif loading.base:
        settle(layer)
    norm, loading.norm = loading.norm, None
    if norm is None:
        return
    if loading.follows:
        layer._reset_magnitudes()
    elif not _same(_norm(layer), norm):
        callers.warn(
            f"{loading.name or type(layer).__name__}: another base weight was loaded without a magnitude, which is "
            "kept and not the norm of this weight: load an adapter for it, or call reset_parameters() of the layer to "
            "begin a new one",
            UserWarning,
        )
