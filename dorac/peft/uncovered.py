"""What PEFT takes, and neither PEFT nor dorac adapts as it was meant: named in a warning, once for each kind."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dorac import callers
from dorac.peft.variants import COVERED, OnDorac
from dorac.stock_peft import LoraLayer
from dorac.weight_reads import read_past_forward

Named = tuple[str, LoraLayer]


def report(root: nn.Module, reported: set[str]) -> None:
    """Warns of DoRA layers below ``root`` that stay stock, never run, or cannot keep what is merged.

    Args:
        reported: the kinds that were named before, to which those named now are added.
    """
    layers = [(name, m) for name, m in root.named_modules() if isinstance(m, LoraLayer) and any(m.use_dora.values())]
    for kinds in (_stock(layers), _past_forward(root, layers), _computed(layers)):
        _warn(kinds, reported)


def report_shared(root: nn.Module, reported: set[str]) -> None:
    """Warns of adapted layers whose weight another module has, too: merging changes that one with it."""
    _warn(_shared(root), reported)


def _warn(kinds: Iterable[tuple[str, str]], reported: set[str]) -> None:
    """Args: kinds: a sentence, which is the kind, and the name of a module that it is true of."""
    named: dict[str, list[str]] = {}
    for sentence, name in kinds:
        named.setdefault(sentence, []).append(name)
    for sentence, names in named.items():
        if sentence not in reported:
            more = ", ..." if len(names) > 8 else ""
            callers.warn(f"{sentence}: {', '.join(names[:8])}{more}", UserWarning)
            reported.add(sentence)


def _stock(layers: list[Named]) -> Iterator[tuple[str, str]]:
    for name, layer in layers:
        for adapter, is_dora in layer.use_dora.items():
            variant = layer.lora_variant.get(adapter)
            # A variant of PEFT's own is covered: only, another thread has just switched it back.
            if is_dora and not isinstance(variant, OnDorac) and type(variant) not in COVERED:
                kind = type(layer).__name__
                yield f"dorac.peft does not cover {kind}, which stays on stock PEFT's DoRA", name


def _past_forward(root: nn.Module, layers: list[Named]) -> Iterator[tuple[str, str]]:
    found = read_past_forward(root, adapters=(LoraLayer,)) if layers else {}
    for name, layer in layers:
        if layer in found:
            yield f"where {found[layer]} reads the weight of these layers past their forward, no adapter runs", name


def _computed(layers: list[Named]) -> Iterator[tuple[str, str]]:
    for name, layer in layers:
        base = layer.get_base_layer()
        if parametrize.is_parametrized(base, "weight"):
            how = ", ".join(type(p).__name__ for p in base.parametrizations.weight)
        else:
            hooks = base._forward_pre_hooks.values()
            how = ", ".join(type(hook).__name__ for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm)))
        if how:
            yield f"a weight that {how} computes does not keep what PEFT merges into it", name


def _shared(root: nn.Module) -> Iterator[tuple[str, str]]:
    layers = [(name, m) for name, m in root.named_modules() if isinstance(m, LoraLayer)]
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    for name, layer in layers:
        weight = layer.get_base_layer()._parameters.get("weight")
        if weight is not None and len(owners[weight]) > 1:
            yield "other modules share the weights of these layers, and are changed by merging into them", name
