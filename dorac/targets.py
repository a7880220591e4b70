"""Which modules of a model an adapter goes to: PEFT's rules for names, ranks and layers, without changing anything."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral

from torch import Tensor, nn

from dorac import callers, offload, stock_peft
from dorac.names import Compile, Names, Pattern, compile_regex, parents, plain_name
from dorac.nn import DoraLayer, is_linear, layer_class, unwrappable
from dorac.places import named_places

ALL_LINEAR = "all-linear"
SELECTING = "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"


@dataclasses.dataclass(frozen=True)
class Target:
    """One module to adapt, with the rank and alpha that the patterns give it, and options of its kind of layer."""

    name: str
    module: nn.Module
    r: int
    lora_alpha: float
    layout: Mapping[str, object] = dataclasses.field(default_factory=dict)


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
    saved: Sequence[str] = (),
    compile: Compile = re.compile,
    warned_of: Collection[str] = SELECTING,
) -> list[Target]:
    """The modules that the arguments name, in the model's order (see :func:`dorac.apply_dora` for their meaning).

    Nothing inside the modules ``saved``, given by their full names, is taken. ``compile`` makes the regexes of
    ``target_modules``, ``exclude_modules`` and the patterns. ``warned_of``: the arguments of which a ``RuntimeWarning``
    names what matches nothing.

    Raises:
        TypeError: an argument that is not names, a regex or numbers.
        ValueError: nothing matched, or a matched module cannot be adapted; all such modules are listed with the reason.
    """
    all_linear = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
    targeted = Names("target_modules", [] if all_linear else target_modules, compile)
    excluded = Names("exclude_modules", exclude_modules or [], compile)
    ranks = Pattern("rank_pattern", rank_pattern, compile)
    alphas = Pattern("alpha_pattern", alpha_pattern, compile)
    layer_index = _layer_index(layers_pattern)
    layers = _layer_numbers(layers_to_transform)
    if layers and isinstance(target_modules, str) and not all_linear:
        raise ValueError(
            "layers_to_transform needs target_modules as a list of names; write the layers into the regex instead"
        )
    if layers_pattern and layers_to_transform is None:
        raise ValueError("layers_pattern needs layers_to_transform, the numbers of the layers")

    def wanted(name: str, module: nn.Module) -> bool:
        named = targeted.match(name)
        if excluded.match(name) or not whole.isdisjoint(parents(name)):
            return False
        if all_linear:
            found = module is not head and (is_linear(module) or isinstance(module, nn.MultiheadAttention))
            return found and (not layers or layer_index(name) in layers)
        return named and (targeted.is_listed(name) or not layers or layer_index(name) in layers)

    refuse_peft(model)
    whole = set(saved)
    head = _output_embedding(model)
    places = list(named_places(model))
    refused = offload.inside_others(model) | _bypassed(places)
    adapted = {name for name, module in places if name and isinstance(module, DoraLayer)}
    places = [
        (name, module)
        for name, module in places
        if name and name.rpartition(".")[0] not in adapted and not hasattr(module, "_orig_mod")
    ]
    targets, reasons = [], []
    for name, module in places:
        plain = plain_name(name)
        if not wanted(plain, module):
            continue
        if isinstance(module, DoraLayer):
            if not all_linear:
                reasons.append(f"{name}: is adapted already")
            continue
        rank = ranks.value(plain, r)
        if reason := refused.get(name) or unwrappable(module) or layer_class(module).unfit_rank(module, rank):
            reasons.append(f"{name}: {reason}")
        else:
            alpha = alphas.value(plain, lora_alpha)
            targets.append(Target(name, module, rank, alpha))
    if reasons:
        raise ValueError(
            "these modules cannot be adapted (name them in exclude_modules to leave them out):\n  "
            + "\n  ".join(reasons)
        )
    if not targets:
        kinds = sorted({n.rpartition(".")[2] for n, m in places if n not in refused and not unwrappable(m)})
        hint = "this model holds none that could be adapted"
        if adapted:
            hint = f"its layers are adapted already ({', '.join(sorted(adapted)[:5])}): dorac.add_adapter adds another"
        if kinds:
            hint = f"modules of this model that could be: {', '.join(kinds[:20])}"
        elif not unwrappable(model):
            hint = f"the model is itself a {type(model).__name__}: wrap it with dorac.nn.{layer_class(model).__name__}"
        if isinstance(target_modules, str) and not all_linear:
            hint = f"a string is a regex for the whole name, name endings go in a list; {hint}"
        if left_out := [name for name, _ in places if targeted.match(plain_name(name))]:
            hint = f"exclude_modules, modules_to_save or layers_to_transform leave out {', '.join(left_out[:5])}"
        raise ValueError(f"target_modules {target_modules!r} matched no module; {hint}")
    for argument, given, what in (
        ("target_modules", targeted, "names that match no module"),
        ("exclude_modules", excluded, "names that match no module"),
        ("rank_pattern", ranks, "keys that match no adapted module"),
        ("alpha_pattern", alphas, "keys that match no adapted module"),
    ):
        if argument in warned_of and (unused := given.unused()):
            callers.warn(f"{argument} has {what}: {unused}")
    return targets


def peft_layers(model: nn.Module) -> list[str]:
    """The names of the modules that PEFT has adapted."""
    if not stock_peft.is_imported("BaseTunerLayer"):  # whoever adapted one has done it
        return []
    adapted = stock_peft.BaseTunerLayer
    return [name for name, module in model.named_modules() if isinstance(module, adapted)]


def refuse_peft(model: nn.Module) -> None:
    """One model is adapted one way: what saves, merges and switches one kind of layers does not know the other."""
    if found := peft_layers(model):
        raise ValueError(
            f"{found[0]} is adapted by PEFT: go on there (LoraConfig(use_dora=True) under dorac.peft.enable()), or "
            "call unload() or merge_and_unload() of the PEFT model first"
        )


def with_eva_ranks(targets: list[Target], eva_state_dict: Mapping[str, Tensor], *, adjust_alpha: bool) -> list[Target]:
    """The targets with the ranks that PEFT's EVA gave them, without those that it gave none.

    Args:
        eva_state_dict: from a module's plain name to its lora_A, ``[rank, in]``.
        adjust_alpha: whether alpha grows with the rank, so that the scaling stays.
    """
    ranked = []
    for target in targets:
        lora_A = eva_state_dict.get(plain_name(target.name))
        if lora_A is None:
            ranked.append(target)
        elif rank := lora_A.shape[0]:
            alpha = target.lora_alpha * rank / target.r if adjust_alpha and rank != target.r else target.lora_alpha
            ranked.append(dataclasses.replace(target, r=rank, lora_alpha=alpha))
    if not ranked:
        raise ValueError("eva_state_dict gives every module the rank 0")
    return ranked


def _layer_numbers(layers_to_transform: int | Sequence[int] | None) -> set[int]:
    layers = [layers_to_transform] if isinstance(layers_to_transform, Integral) else layers_to_transform or []
    if isinstance(layers, str) or not all(isinstance(layer, Integral) for layer in layers):
        raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {layers_to_transform!r}")
    return set(layers)


def _layer_index(layers_pattern: str | Sequence[str] | None) -> Callable[[str], int | None]:
    """Finds the number of the layer that a module lies in: the first in its name, or the one after a pattern."""
    Names("layers_pattern", layers_pattern or [])
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    expressions = [compile_regex("layers_pattern", p, around=r"(?:^|.*?\.){}\.(\d+)\.") for p in patterns if p] or [
        re.compile(r".*?\.[^.]*\.(\d+)\.")
    ]

    def index(name: str) -> int | None:
        found = next((m for m in (e.match(name) for e in expressions) if m), None)
        return int(found.group(1)) if found else None

    return index


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The language-model head, which "all-linear" leaves out as PEFT does."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _bypassed(places: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Modules whose weight is read past their forward, or that have no DoRA, with the reason to refuse them."""
    bypassed = {}
    for name, module in places:
        if isinstance(module, nn.MultiheadAttention):
            bypassed[name] = "MultiheadAttention is not supported: it reads its projections past their forward"
            bypassed[f"{name}.out_proj".lstrip(".")] = (
                "MultiheadAttention reads the weight of out_proj past its forward"
            )
        elif isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                bypassed[f"{name}.{child}".lstrip(".")] = (
                    f"TransformerEncoderLayer reads the weight of {child} past its forward in its inference fast path"
                )
        elif type(module).__module__.startswith("transformers.models."):
            kind = type(module).__name__
            child = "conv" if "ShortConv" in kind else "conv1d"  # of state-space blocks and what is like them
            if isinstance(getattr(module, child, None), nn.Conv1d):
                bypassed[f"{name}.{child}".lstrip(".")] = f"{kind} reads the weight of {child} past its forward"
        elif hasattr(module, "_orig_mod"):
            bypassed[f"{name}._orig_mod".lstrip(".")] = (
                "is compiled by itself (torch.compile), and that would go on to run it as it is now: compile it after "
                "it is adapted"
            )
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            bypassed[name] = (
                f"{type(module).__name__} is not supported: transposed convolutions have no DoRA norm defined"
            )
    return bypassed
