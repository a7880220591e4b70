"""PEFT's ``LoraConfig`` as arguments of :func:`dorac.apply_dora`.

A config is known by its attributes. PEFT itself is imported only where its table of default targets is asked for.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping

from torch import nn

# Fields that are arguments of apply_dora of the same name.
_ARGUMENTS = (
    "target_modules",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
)
# Fields that the saved adapter_config.json repeats ...
_RECORDED = ("task_type", "auto_mapping", "base_model_name_or_path", "revision")
# ... and those that change nothing here: each layer knows how its weight lies, the others belong to refused ones.
_NEUTRAL = ("peft_type", "peft_version", "use_dora", "fan_in_fan_out", "megatron_core", "qalora_group_size")
# Settings of starts, by the start that they are for.
SETTINGS_OF_STARTS = {
    "eva": "eva_config",
    "corda": "corda_config",
    "lora_ga": "lora_ga_config",
    "loftq": "loftq_config",
}
# The heads that PEFT trains whole for a task, where the model has them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Where a wrapped model remembers the recorded fields of its config.
RECORD_ATTRIBUTE = "dora_config_record"


def is_config(value: object) -> bool:
    """Whether this is a config of PEFT's."""
    return hasattr(value, "peft_type")


def takes_lora_config(apply: Callable) -> Callable:
    """Has ``apply(model, target_modules, ..., config=None)`` take a ``LoraConfig`` as ``config`` or second.

    Raises:
        TypeError: arguments beside the config that the config has a field for; a config that is none.
        ValueError: see :func:`arguments_of`.
    """

    @functools.wraps(apply)
    def taking(model: nn.Module, target_modules: object = None, *args: object, **options: object) -> object:
        if is_config(target_modules) and options.get("config") is None:
            config, target_modules = target_modules, None
        else:
            config = options.get("config")
        if config is None:
            return apply(model, target_modules, *args, **options)
        if not is_config(config):
            raise TypeError(f"config must be a LoraConfig of PEFT's, got {type(config).__name__}")
        beside = [name for name in _ARGUMENTS if name in options]
        beside += _ARGUMENTS[1 : 1 + len(args)]
        beside += ["target_modules"] if target_modules is not None else []
        if beside:
            raise TypeError(
                f"{apply.__name__} got {', '.join(sorted(beside))} beside a {type(config).__name__}: set that there"
            )
        return apply(model, **arguments_of(config, model), **{**options, "config": config})

    return taking


def arguments_of(config: object, model: nn.Module) -> dict[str, object]:
    """The arguments of ``apply_dora`` that a ``LoraConfig`` stands for.

    Raises:
        ValueError: a config that is none of DoRA's, or fields that ask for what dorac does not have, all by name.
    """
    kind = type(config).__name__
    if config.peft_type != "LORA":
        raise ValueError(f"apply_dora takes a LoraConfig with use_dora=True, got a {kind} of {config.peft_type!s}")
    if not getattr(config, "use_dora", False):
        raise ValueError(f"the {kind} has use_dora=False, apply_dora makes DoRA adapters: set use_dora=True")
    if getattr(config, "inference_mode", False):
        raise ValueError(
            f"the {kind} has inference_mode=True, apply_dora makes an adapter to train: set inference_mode=False, or "
            "read a saved adapter with dorac.load_adapter"
        )
    known = {*_ARGUMENTS, *_RECORDED, *_NEUTRAL, "inference_mode"}
    known.add(SETTINGS_OF_STARTS.get(getattr(config, "init_lora_weights", None)))
    foreign = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in known and _is_set(config, k)}
    if foreign:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(foreign.items()))
        raise ValueError(f"the {kind} asks for what dorac does not have: {listed}")
    arguments = {name: getattr(config, name) for name in _ARGUMENTS if hasattr(config, name)}
    heads = _HEADS.get(recorded(config).get("task_type"), ())
    present = [head for head in heads if any(name.endswith(head) for name, _ in model.named_modules())]
    if present:
        arguments["modules_to_save"] = list(dict.fromkeys([*(arguments.get("modules_to_save") or []), *present]))
    return arguments


def _is_set(config: object, name: str) -> bool:
    """Whether a field asks for something: it is neither empty nor what the config's class has by default."""
    value = getattr(config, name)
    if not value or not dataclasses.is_dataclass(config):
        return bool(value)
    field = next((field for field in dataclasses.fields(config) if field.name == name), None)
    if field is None:
        return True
    if field.default_factory is not dataclasses.MISSING:
        return value != field.default_factory()
    return value != field.default


def recorded(config: object) -> dict[str, object]:
    """What the saved config repeats of this one, in JSON's types."""
    fields = {name: getattr(config, name, None) for name in _RECORDED}
    return {name: getattr(value, "value", value) for name, value in fields.items() if value is not None}


def default_targets(model: nn.Module) -> str | list[str]:
    """What PEFT adapts in models of this architecture.

    Raises:
        ValueError: PEFT is not installed, or does not know the architecture.
    """
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    remedy = "give target_modules: a list of names, a regex for whole names, or 'all-linear'"
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"target_modules is not given, and PEFT, which has defaults, is not installed; {remedy}")
    from dorac.stock_peft import default_targets as TABLE

    if model_type not in TABLE:
        what = f"models of type {model_type!r}" if model_type else f"a {type(model).__name__}, which has no model_type"
        raise ValueError(f"target_modules is not given, and PEFT has no default for {what}; {remedy}")
    return TABLE[model_type]
