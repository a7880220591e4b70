"""Warnings about adapters that may not take part in what their model computes."""

from collections.abc import Iterable, Mapping

from torch import nn

from dorac import callers, packed, weight_reads
from dorac.nn import DoraLayer, starts
from dorac.places import named_places

_SHOWN = 8  # names of one kind in a warning


def warn_read_past_forward(model: nn.Module, modules: Mapping[str, nn.Module], *, merging: bool) -> None:
    """Names those of ``modules`` whose weight code of the model reads past their forward: at wrapping, and at merging.

    That is what the source says, whichever path the forward takes; see :mod:`dorac.weight_reads`.
    """
    found = weight_reads.read_past_forward(model, adapters=(DoraLayer,))
    by_place: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module in found:
            by_place.setdefault(found[module], []).append(name)
    if not by_place:
        return
    if merging:
        meaning = "where that code runs, merging changes what it computes, since it did not see the adapter"
    else:
        meaning = (
            "where that code runs, the adapter does not: it gets no gradient. dorac.find_idle(model, *inputs) tells "
            "whether it does, exclude_modules leaves modules out"
        )
    places = (f"{listed(names)} (in {place})" for place, names in by_place.items())
    callers.warn(f"the weight of these modules can be read past their forward; {meaning}:\n  " + "\n  ".join(places))


def warn_unnamed_places(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Names those of ``modules`` that the model holds in other places, too, where no adapter is put."""
    held: dict[nn.Module, list[str]] = {}
    for name, module in named_places(model):
        holder = model.get_submodule(name.rpartition(".")[0])
        if name not in modules and not isinstance(holder, DoraLayer):  # which adapts it there
            held.setdefault(module, []).append(name)
    found = [f"{name} (also {', '.join(held[module])})" for name, module in modules.items() if module in held]
    if found:
        callers.warn(
            "the model holds these modules in other places, too, which are not named: called there they run without "
            f"the adapter. Name all places of a module to adapt it in each: {listed(found)}"
        )


def warn_dense_copies(modules: Mapping[str, nn.Module]) -> None:
    """Names those quantised ones of ``modules`` whose norm takes a dense copy of the weight."""
    found = [
        name for name, module in modules.items() if packed.holder(module) is not None and packed.of(module) is None
    ]
    if found:
        callers.warn(
            "the format of these quantised weights is read through their own dequantisation: each norm takes a dense "
            f"copy of the weight (dorac.cache_norms: one in an optimizer's step): {listed(found)}"
        )


def warn_untrained(layers: Mapping[str, DoraLayer]) -> None:
    """Names the layers whose delta is still zero, as at their start, if that of others is not.

    A layer whose adapter is frozen is left out, and so is every layer of a model that nobody has trained.
    """
    untrained = {name: layer for name, layer in layers.items() if starts.has_no_delta(layer)}
    if len(untrained) == len(layers):
        return
    names = [n for n, layer in untrained.items() if any(p.requires_grad for p in layer.parameters(recurse=False))]
    if names:
        callers.warn(
            f"the adapters of {listed(names)} have a factor of zeros, as at their start, unlike others of this model. "
            "If they were to be trained, dorac.find_idle(model, *inputs) tells why they were not"
        )


def warn_zero_scaling(alphas: Mapping[str, float]) -> None:
    """Names new adapters whose lora_alpha is 0: no gradient reaches their factors."""
    if names := [name for name, lora_alpha in alphas.items() if lora_alpha == 0]:
        callers.warn(
            f"lora_alpha is 0 for {listed(names)}: with a scaling of 0 their lora_A and lora_B do nothing and get no "
            "gradient, the magnitude alone is trained"
        )


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
