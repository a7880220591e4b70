"""What of a model is adapted, trained whole or tied, and what surgery refuses for it."""

import bisect
import sys
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dorac import lora_config, offload
from dorac.names import Names, parents
from dorac.nn import DoraLayer
from dorac.places import Index, dora_layers
from dorac.targets import peft_layers
from dorac.undo import Undo

# Where a wrapped model remembers which modules are trained and saved whole.
SAVED_ATTRIBUTE = "dora_modules_to_save"


def bare(model: nn.Module) -> nn.Module:
    """The module itself inside ``torch.compile``, ``DataParallel``, DDP: surgery and checkpoints go by its names.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def refuse_ddp(model: nn.Module) -> None:
    """An adapter cannot join a model that DDP holds already."""
    if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is in DistributedDataParallel, which would not synchronise the new parameters: adapt the model "
            "first, then put it there"
        )


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered: after a forward some parameters are still copies, and writes to them get lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def refuse_offloaded_as_parts(model: nn.Module, layers: Mapping[str, DoraLayer]) -> None:
    """The values of such layers are there only while an outer module runs."""
    reasons = offload.inside_others(model)
    for name in layers:
        if name in reasons:
            raise ValueError(f"{name} {reasons[name]}")


def require_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers of a model by name; a ``ValueError`` if there is none."""
    layers = dora_layers(model)
    if not layers:
        if found := peft_layers(model):
            raise ValueError(
                f"{found[0]} is adapted by PEFT: call save_pretrained, merge_adapter, unmerge_adapter, "
                "merge_and_unload or set_adapter of the PEFT model"
            )
        raise ValueError(f"{type(model).__name__} holds no DoRA layer; wrap it with dorac.apply_dora first")
    return layers


def refuse_tied(model: nn.Module, layers: Iterable[DoraLayer], deed: str) -> None:
    """A base weight of ``layers`` that something outside its wrapper reads too must not be written to."""
    index, layers = Index(model), set(layers)
    for layer, names in index.modules.items():
        if layer not in layers:
            continue
        prefixes = tuple(f"{name}." if name else "" for name in names)
        for attribute, weight in layer.named_base_weights().items():
            tied = next((n for n in index.names_in_memory(weight) if not n.startswith(prefixes)), None)
            if tied is not None:
                own = f"layer.base_layer.{attribute}"
                raise ValueError(
                    f"{prefixes[0]}base_layer.{attribute} is tied to {tied}: {deed} would change both. Give the "
                    f"layer a {attribute} of its own first ({own} = nn.Parameter({own}.clone()))"
                )


def replace(model: nn.Module, modules: Mapping[str, nn.Module], log: Undo) -> None:
    """Puts modules in the places that they are named for."""
    log.keep_module(*{model.get_submodule(name.rpartition(".")[0]) for name in modules})
    for name, module in modules.items():
        model.set_submodule(name, module)


def saved_modules(model: nn.Module) -> list[str]:
    """The names of the modules of a wrapped model, or of parts that were wrapped, that are trained and saved whole."""
    names = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in vars(module).get(SAVED_ATTRIBUTE, [])
    ]
    return list(dict.fromkeys(names))


def config_record(model: nn.Module) -> dict[str, object]:
    """What the saved config of a wrapped model repeats of the config that it was wrapped with."""
    return vars(model).get(lora_config.RECORD_ATTRIBUTE, {})


def find_saved(model: nn.Module, modules_to_save: Sequence[str], *, all_needed: bool = True) -> list[str]:
    """The names of the modules that ``modules_to_save`` means.

    Raises:
        TypeError: not a list of names.
        ValueError: an entry that matches nothing (if ``all_needed``), a module that shares a parameter with the rest of
            the model, or one that is or holds a DoRA layer.
    """
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names, got the string {modules_to_save!r}")
    Names("modules_to_save", modules_to_save)
    index = Index(model)
    names = [own[0] for own in index.modules.values() if own[0]]
    backwards = sorted((name[::-1], place) for place, name in enumerate(names))
    found = []
    for ending in modules_to_save:
        start = ending[::-1]
        first = place = bisect.bisect_left(backwards, (start,))
        while place < len(backwards) and backwards[place][0].startswith(start):
            place += 1
        if all_needed and place == first:
            raise ValueError(f"modules_to_save: {ending!r} matches no module")
        found += [names[index] for index in sorted(index for _, index in backwards[first:place])]
    _refuse_unsavable(model, index, found)
    return found


def _refuse_unsavable(model: nn.Module, index: Index, found: list[str]) -> None:
    """What is trained whole must hold no adapter, lie in none and share no parameter with the rest."""
    if not found:
        return
    layers = list(dora_layers(model))
    order = {name: place for place, name in enumerate(layers)}
    within: dict[str, int] = {}  # the first layer in each module
    for place, layer in enumerate(layers):
        for name in parents(layer):
            within.setdefault(name, place)
    for name in found:
        around = [order[parent] for parent in parents(name) if parent in order]
        if around or name in within:
            adapted = layers[min([*around, *([within[name]] if name in within else [])])]
            raise ValueError(f"modules_to_save: {name} cannot be trained whole, {adapted} is adapted already")
        own = model.get_submodule(name).parameters()
        outside = (key for p in own for key in index.names(p) if not key.startswith(f"{name}."))
        if shared := next(outside, None):
            raise ValueError(
                f"modules_to_save: {name} shares its weight with {shared}; untie them, or both would be trained"
            )
