"""Which modules of a model an adapter goes to: PEFT's rules for names, ranks and layers, without changing anything."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import nn

from dorac.nn import DoraLinear
from dorac.nn.linear import is_conv1d, unwrappable

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Target:
    """One module to adapt, with the rank and alpha that the patterns give it."""

    name: str
    module: nn.Module
    r: int
    lora_alpha: float


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> list[Target]:
    """The modules that the arguments name, in the model's order (see :func:`dorac.apply_dora` for their meaning).

    Raises:
        TypeError: an argument that is not names, a regex or numbers.
        ValueError: nothing matched, or a matched module cannot be adapted; all such modules are listed with the reason.
    """
    _check_names("target_modules", target_modules)
    _check_names("exclude_modules", exclude_modules or [])
    _check_names("layers_pattern", layers_pattern or [])
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names, got the string {modules_to_save!r}")
    _check_names("modules_to_save", modules_to_save or [])
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform or [])
    all_linear = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
    if layers and isinstance(target_modules, str) and not all_linear:
        raise ValueError("layers_to_transform needs target_modules as a list of names; write the layers into the regex instead")

    def wanted(name: str, module: nn.Module) -> bool:
        if _matches(exclude_modules or [], name) or _inside_saved(modules_to_save or [], name):
            return False
        if all_linear:
            found = name != output_name and (isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module))
            return found and (not layers or _layer_index(name, layers_pattern) in layers)
        if not _matches(target_modules, name):
            return False
        exact = not isinstance(target_modules, str) and name in target_modules
        return exact or not layers or _layer_index(name, layers_pattern) in layers

    output_name = _output_embedding_name(model)
    refused = _bypassed_parents(model)
    targets, reasons = [], []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or _inside_adapter(model, name) or not wanted(name, module):
            continue
        if isinstance(module, DoraLinear):
            if not all_linear:
                reasons.append(f"{name}: is adapted already")
        elif reason := refused.get(name) or unwrappable(module):
            reasons.append(f"{name}: {reason}")
        else:
            rank = from_pattern("rank_pattern", rank_pattern, name, r)
            targets.append(Target(name, module, rank, from_pattern("alpha_pattern", alpha_pattern, name, lora_alpha)))
    if reasons:
        raise ValueError(
            "these modules cannot be adapted (name them in exclude_modules to leave them out):\n  " + "\n  ".join(reasons)
        )
    if not targets:
        kinds = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not unwrappable(module) and name})
        hint = (
            f"modules of this model that can be: {', '.join(kinds[:20])}" if kinds else "this model has none that could be adapted"
        )
        raise ValueError(f"target_modules {target_modules!r} matched no module; {hint}")
    return targets


def _check_names(argument: str, names: str | Sequence[str]) -> None:
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(f"{argument} is not a valid regex: {names!r}: {error}") from None
        return
    if not isinstance(names, (Sequence, set, frozenset)) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{argument} must be a string or a list of strings, got {names!r}")


def _matches(names: str | Sequence[str], key: str) -> bool:
    """A string is a regex for the whole name; a list holds names or their dotted endings."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def _inside_saved(modules_to_save: Sequence[str], key: str) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in modules_to_save)


def _layer_index(key: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer that a module lies in: the first number in its name, or the one after a pattern."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns if p] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for m in (re.match(e, key) for e in expressions) if m), None)
    return int(found.group(1)) if found else None


def from_pattern(argument: str, pattern: Mapping[str, float] | None, name: str, default: float):
    """The value of the first key that matches the end of ``name`` as a regex (a leading ``^`` anchors it)."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{argument} has a key that is not a valid regex: {key!r}: {error}") from None
    return default


def _output_embedding_name(model: nn.Module) -> str | None:
    """The language-model head, which "all-linear" leaves out as PEFT does."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), DoraLinear)


def _bypassed_parents(model: nn.Module) -> dict[str, str]:
    """Linear layers whose parent reads their weight past their forward, with the reason to refuse them."""
    bypassed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            bypassed[name] = "MultiheadAttention is not supported: it reads its projections past their forward"
            bypassed[f"{name}.out_proj".lstrip(".")] = "MultiheadAttention reads the weight of out_proj past its forward"
        elif isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                bypassed[f"{name}.{child}".lstrip(".")] = (
                    f"TransformerEncoderLayer reads the weight of {child} past its forward in its inference fast path"
                )
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            bypassed[name] = f"{type(module).__name__} is not supported: transposed convolutions have no DoRA norm defined"
    return bypassed
