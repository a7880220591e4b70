"""``adapter_config.json``: what it says of an adapter, and whether it goes with the weights beside it."""

import collections
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

from dorac import callers, lora_config
from dorac.bounded import Bounded
from dorac.names import Names, Pattern, parents, plain_name, shortened
from dorac.nn import DoraLayer, residual
from dorac.nn.hyperparameters import check_hyperparameters, scaling_factor
from dorac.notices import listed
from dorac.places import named_places
from dorac.wrapped import config_record, saved_modules

CONFIG_NAME = "adapter_config.json"
LARGEST_RANK = 2**31 - 1
# Where the metadata of the weights keep the digests of the fields that decide what they mean.
DIGESTS_KEY = "dorac_config"

_NAMES = (str, list, type(None))
_NUMBER = (int, float)
# What a config may say, and in what types: these are honoured ...
_HONOURED = {
    "peft_type": (str,),
    "use_dora": (bool,),
    "r": (int,),
    "lora_alpha": _NUMBER,
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool, type(None)),
    "lora_dropout": (*_NUMBER, type(None)),
    "target_modules": (str, list),
    "exclude_modules": _NAMES,
    "layers_to_transform": (int, list, type(None)),
    "layers_pattern": _NAMES,
    "modules_to_save": (list, type(None)),
}
# ... and these have no influence on what the adapter computes. Everything else must be unset.
_NEUTRAL = {
    "auto_mapping": (dict, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "eva_config": (dict, type(None)),
    "fan_in_fan_out": (bool, type(None)),
    "inference_mode": (bool, type(None)),
    "init_lora_weights": (bool, str, type(None)),
    "megatron_core": (str, type(None)),
    "peft_version": (str, type(None)),
    "qalora_group_size": (int, type(None)),
    "revision": (str, type(None)),
    "runtime_config": (dict, type(None)),
    "task_type": (str, type(None)),
}
_TYPES = _HONOURED | _NEUTRAL
# Starts that leave the base weight as it is, and those that take a part out of it, which PEFT does again when it loads
# what it has not converted.
_KEEPING_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_TAKING_STARTS = r"pissa(_niter_\d+)?|olora|corda"
_OTHER_STARTS = {
    "loftq": (
        "replaced the base weights by quantised ones, which are not in the file: peft.PeftModel.from_pretrained makes "
        "them again, and dorac.peft.enable() has that model run on dorac"
    ),
    "lora_ga": (
        "took a part out of the base weights along a gradient that is not in the file, and which PEFT itself leaves in "
        "when it loads: merge the adapter in the model that it was trained in"
    ),
}
_WORDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
_WORDS |= {int: "an integer", float: "a number"}
# PEFT's word for a task whose heads it leaves as they are, and transformers' table of the classes for it.
_TASKS = {
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
# An adapter with another dropout is the same function; what the names are of is not a matter of order.
_DECIDING = sorted(_HONOURED.keys() - {"peft_type", "use_dora", "lora_dropout"})


def describe(model: nn.Module, layers: Mapping[str, DoraLayer]) -> dict:
    """The ``LoraConfig`` that describes the wrapped layers, as a dictionary.

    Raises:
        ValueError: layers that one config cannot describe.
    """

    def common(attribute: str):
        values = {getattr(layer, attribute) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(
                f"one adapter_config.json cannot describe layers of different {attribute}: {sorted(values)}"
            )
        return values.pop()

    def usual_and_pattern(value: Callable[[DoraLayer], float]):
        values = {plain_name(name): value(layer) for name, layer in layers.items()}
        usual = collections.Counter(values.values()).most_common(1)[0][0]
        return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}

    r, rank_pattern = usual_and_pattern(residual.saved_rank)
    lora_alpha, alpha_pattern = usual_and_pattern(_lora_alpha)
    return {
        "peft_type": "LORA",
        "use_dora": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        **_built_by(model),
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": common("lora_dropout"),
        "use_rslora": common("use_rslora"),
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "target_modules": _shortest_names(model, layers),
        "modules_to_save": [plain_name(name) for name in saved_modules(model)] or None,
        "bias": "none",
        "init_lora_weights": True,
        **_recorded(model),
    }


def _recorded(model: nn.Module) -> dict:
    """What the config that the model was wrapped with says; a task there is in place of the model's class."""
    record = config_record(model)
    return {"auto_mapping": None} | record if "task_type" in record else record


def _built_by(model: nn.Module) -> dict:
    """By what PEFT's ``AutoPeftModel`` classes find the class of the base model: a task, or else the class itself."""
    tables = sys.modules.get("transformers.models.auto.modeling_auto")
    for cls in type(model).__mro__:
        there = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
        if there is not cls or not hasattr(cls, "from_pretrained"):
            continue  # FSDP2 gives a model a class that no module holds
        for task, table in _TASKS.items() if tables and cls.__module__.startswith("transformers.") else ():
            if cls.__name__ in getattr(tables, table).values():
                return {"task_type": task, "auto_mapping": None}
        mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        return {"task_type": None, "auto_mapping": mapping}
    return {"task_type": None, "auto_mapping": None}


def _lora_alpha(layer: DoraLayer) -> float:
    """The alpha of the layer's scaling, which may have been set since it was made."""
    scaling, r = float(layer.scaling), residual.saved_rank(layer)
    if scaling == scaling_factor(r, layer.lora_alpha, layer.use_rslora):
        return layer.lora_alpha
    return scaling / scaling_factor(r, 1, layer.use_rslora)


def _shortest_names(model: nn.Module, layers: Mapping[str, DoraLayer]) -> list[str] | str:
    """The last parts of the wrapped modules' names, or else their full names, or else a regex: what names no other."""
    plain = [plain_name(name) for name in layers]
    endings = sorted({name.rpartition(".")[2] for name in plain})
    outside = (name for name, _ in named_places(model) if layers.keys().isdisjoint(parents(name.rpartition(".")[0])))
    others = {plain_name(name) for name in outside} - set(plain)
    for names in (endings, plain):
        named = Names("target_modules", names)
        if not any(named.match(other) for other in others):
            return names
    return "|".join(map(re.escape, plain))


def digests(config: Mapping[str, object]) -> dict[str, str]:
    """A digest of each field that decides what the weights beside the config mean."""
    return {field: hashlib.sha256(_canonical(config.get(field)).encode()).hexdigest() for field in _DECIDING}


def _canonical(value: object) -> str:
    """The same text for values that mean the same: unset or empty, 2 or 2.0, names in any order."""
    if value is False or value in ("", [], {}):
        value = None
    elif isinstance(value, list):
        value = sorted({json.dumps(item) for item in value})
    elif isinstance(value, dict):
        value = {key: float(number) for key, number in value.items()}
    elif isinstance(value, int) and value is not True:
        value = float(value)
    return json.dumps(value, sort_keys=True)


def check_digests(path: Path, config: Mapping[str, object], weights: Path, metadata: Mapping[str, str]) -> None:
    """Refuses a config that is not the one that the weights were saved with, as far as their metadata tell.

    Raises:
        ValueError: fields that differ, with both paths.
    """
    if DIGESTS_KEY not in metadata:  # PEFT's files
        return
    try:
        written = dict(json.loads(metadata[DIGESTS_KEY]))
    except (TypeError, ValueError):
        raise ValueError(f"{weights}: its metadata {DIGESTS_KEY!r} is damaged") from None
    present = digests(config)
    differing = [field for field in present if written.get(field) != present[field]]
    if differing:
        raise ValueError(
            f"{path} is not the config that {weights} was saved with: {', '.join(differing)} differ. If saving was "
            "interrupted, save the adapter again. If the config was edited on purpose, take the record of it out of "
            f"the weights: tensors = safetensors.torch.load_file({str(weights)!r}); safetensors.torch.save_file("
            f"tensors, {str(weights)!r}, metadata={{'format': 'pt'}})"
        )


def warn_lost_order(
    path: Path, config: Mapping[str, object], metadata: Mapping[str, str], names: Iterable[str]
) -> None:
    """Names those modules whose alpha is that of one of several keys: PEFT writes them in the order of the alphabet.

    The first that matches counts, in PEFT too, which so reads another scaling than it trained with. What dorac saves
    has a key for each module.
    """
    pattern = config.get("alpha_pattern") or {}
    if DIGESTS_KEY in metadata or list(pattern) != sorted(pattern):
        return
    alphas = Pattern("alpha_pattern", pattern, Bounded().compile)
    found = [name for name in names if len(alphas.values(name)) > 1]
    if found:
        callers.warn(
            f"{path}: several keys of alpha_pattern match these modules, and the first counts, but PEFT sorts the keys "
            "when it saves, so that the file does not tell which was the first in training. Should it be another, "
            f"change the file so that one key alone matches each module: {listed(found)}"
        )


def read_config(path: Path) -> dict:
    """The config in a file, checked.

    Raises:
        OSError: the file cannot be read. ValueError: not the config of a DoRA adapter that dorac can run; the path is
            in the sentence.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not config.get("use_dora"):
        raise ValueError(f"{path} does not describe a DoRA adapter (peft_type 'LORA' with use_dora true)")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    init = config.get("init_lora_weights")
    known = {*_TYPES, lora_config.SETTINGS_OF_STARTS.get(init if isinstance(init, str) else None)}
    foreign = {k: v for k, v in config.items() if k not in known and v and not (k == "bias" and v == "none")}
    if foreign:
        raise ValueError(
            f"{path} asks for what dorac does not have: {', '.join(f'{k}={v!r}' for k, v in sorted(foreign.items()))}"
        )
    try:
        _check_values(config)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _check_values(config: Mapping[str, object]) -> None:
    for field, types in _TYPES.items():
        value = config.get(field)
        if field in config and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            words = " or ".join(dict.fromkeys(_WORDS[t] for t in types if not (t is int and float in types)))
            raise TypeError(f"{field} must be {words}, got {shortened(value)}")
    init = config.get("init_lora_weights")
    if init not in _KEEPING_STARTS and taken_out(config) is None:
        reason = _OTHER_STARTS.get(init, "is no start that PEFT has with DoRA")
        raise ValueError(f"init_lora_weights={init!r} {reason}")
    for r in (config["r"], *(config.get("rank_pattern") or {}).values()):
        check_hyperparameters(r, 1, config.get("lora_dropout") or 0.0, True, None)
        if r > LARGEST_RANK:
            raise ValueError(f"r must be at most {LARGEST_RANK}, got {r}")
    for lora_alpha in (config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()):
        check_hyperparameters(1, lora_alpha, 0.0, True, None)
    numbers = config.get("layers_to_transform")
    if isinstance(numbers, list) and not all(type(number) is int for number in numbers):
        raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {numbers!r}")
    if isinstance(config.get("modules_to_save"), list):
        Names("modules_to_save", config["modules_to_save"])
    layers_pattern = config.get("layers_pattern") or []
    for name in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]*", name):
            raise ValueError(f"layers_pattern must be names of letters, digits and dots here, got {name!r}")
    compile = Bounded().compile
    for field in ("target_modules", "exclude_modules"):
        Names(field, config.get(field) or [], compile)
    for field in ("rank_pattern", "alpha_pattern"):
        Pattern(field, config.get(field), compile)


def taken_out(config: Mapping[str, object]) -> str | None:
    """The start by which the adapter is one over a part of the base weight, if it is none over the weight itself.

    PEFT writes so what it has not converted. What dorac writes, and what PEFT converts, is over the whole weight.
    """
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and re.fullmatch(_TAKING_STARTS, init) else None


def setting_mismatches(layers: Mapping[str, DoraLayer], config: Mapping[str, object]) -> list[str]:
    """Where the rank or the scaling of a wrapped model is not the one that the adapter was trained with."""
    compile = Bounded().compile
    file_ranks = Pattern("rank_pattern", config.get("rank_pattern"), compile)
    alphas = Pattern("alpha_pattern", config.get("alpha_pattern"), compile)
    problems, other_ranks = [], {}
    for name, layer in layers.items():
        plain = plain_name(name)
        r, lora_alpha = file_ranks.value(plain, config["r"]), alphas.value(plain, config["lora_alpha"])
        if r != (own := residual.saved_rank(layer)):
            other_ranks.setdefault((own, r), []).append(name)
        scaling = scaling_factor(r, lora_alpha, bool(config.get("use_rslora")))
        if not math.isclose(scaling, layer.scaling, rel_tol=1e-12):
            problems.append(f"scaling of {name}: the model has {layer.scaling:g}, the file {scaling:g}")
    return [
        *(f"wrapped with r = {own}, the file has r = {r}: {listed(names)}" for (own, r), names in other_ranks.items()),
        *problems,
    ]
