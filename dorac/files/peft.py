"""PEFT's files, with every spelling of their keys, and torchtune's export to them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dorac import adapter_config
from dorac.bounded import Bounded
from dorac.files import parts
from dorac.files.layers import Contents, Layer
from dorac.files.parts import Given
from dorac.files.storage import CONFIG_NAME, Raw
from dorac.names import Pattern, plain_name

NAME = "PEFT"
NVLABS_TYPE = "DORA"  # of NVlabs' fork
PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# base_model.model.<module>.<role>[.<adapter>][.weight]
_KEY = re.compile(
    rf"(?P<prefix>{re.escape(PREFIX)})?(?P<name>.+?)\.(?P<role>{'|'.join(_FACTORS)}|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)


def recognise(raw: Raw) -> bool:
    matches = [match for key in raw.tensors if (match := _KEY.fullmatch(key))]
    return any(match["prefix"] for match in matches)


def canonical(key: str) -> str:
    """The key as PEFT writes it: without an adapter's name, and the magnitude's without ``.weight``."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    weight = ".weight" if match["role"] in ("lora_A", "lora_B") and key.endswith(".weight") else ""
    return f"{match['prefix'] or ''}{match['name']}.{match['role']}{weight}"


def one_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under canonical keys.

    Raises:
        ValueError: those of several adapters.
    """
    names = {match["adapter"] for key in tensors if (match := _KEY.fullmatch(key))}
    if len(names) > 1:
        raise ValueError(f"{NAME}: the keys are of several adapters, {sorted(map(str, names))}: keep those of one")
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if canonical(key) in found:
            raise ValueError(f"{NAME}: {canonical(key)} is there twice, in two spellings")
        found[canonical(key)] = tensor
    return found


def check_config(path: Path, config: Mapping[str, object], raw: Raw) -> None:
    """Refuses a config that is not the one of the weights, and warns of scalings that it leaves open.

    Raises:
        ValueError: see :func:`dorac.adapter_config.check_digests`.
    """
    adapter_config.check_digests(path, config, raw.path, raw.metadata)
    names = dict.fromkeys(plain_name(match["name"]) for key in raw.tensors if (match := _KEY.fullmatch(key)))
    adapter_config.warn_lost_order(path, config, raw.metadata, names)


def read(raw: Raw, given: Given) -> Contents:
    roles = {f"{role}.weight": role for role in _FACTORS[:2]} | {role: role for role in _FACTORS}
    modules, others = parts.grouped(one_adapter(raw.tensors), roles | {"lora_magnitude_vector": "magnitude"})
    has_magnitudes = any("magnitude" in tensors for tensors in modules.values())
    from_torchtune = raw.config is not None and "use_dora" not in raw.config and has_magnitudes
    settings = _settings(raw, from_torchtune)
    layers = []
    for key, tensors in modules.items():
        name = key.removeprefix(PREFIX)
        embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
        factors = _FACTORS[2:] if embedding else _FACTORS[:2]
        lora_A, lora_B = parts.factors(NAME, name, tensors, *factors)
        magnitude = tensors.get("magnitude")
        if lora_A.ndim == 3 and magnitude is not None and magnitude.ndim == 2:
            raise ValueError(f"{NAME}: {name} holds experts, which dorac.load_adapter alone reads")
        value, rslora, r = settings(plain_name(name))
        if r not in (None, lora_A.shape[0]):
            raise ValueError(f"{NAME}: {name} has r = {r} in {CONFIG_NAME}, its lora_A is {list(lora_A.shape)}")
        s = parts.scaling(NAME, given, lora_A.shape[0], value, rslora)
        kind = "embedding" if embedding else None
        layers.append(parts.build(NAME, name, lora_A, lora_B, magnitude, s, kind=kind))
    rotary = frozenset(
        layer.name for layer in layers if from_torchtune and layer.name.rpartition(".")[2] in ("q_proj", "k_proj")
    )
    return Contents(NAME, tuple(layers), raw.config or {}, others, meta_rows=rotary)


def _settings(raw: Raw, from_torchtune: bool) -> Callable[[str], tuple[object, bool, int | None]]:
    """A function of a module's name: its alpha (None where no file says it), whether s is ``alpha / sqrt(r)``, r."""
    if raw.config is None:
        return lambda name: (None, False, None)
    path = raw.path.parent / CONFIG_NAME
    if from_torchtune:
        return lambda name: (raw.config.get("lora_alpha"), False, None)
    config = adapter_config.read_config(path)
    check_config(path, config, raw)
    if start := adapter_config.taken_out(config):
        raise ValueError(
            f"{path}: the adapter is over what init_lora_weights={start!r} leaves of the base weights: "
            "dorac.load_adapter reads it into a model"
        )
    compile = Bounded().compile
    alphas, ranks = (Pattern(name, config.get(name), compile) for name in ("alpha_pattern", "rank_pattern"))
    rslora = bool(config.get("use_rslora"))
    return lambda name: (alphas.value(name, config["lora_alpha"]), rslora, ranks.value(name, config["r"]))


def tensors_of(layer: Layer, *, plain: bool = False) -> dict[str, Tensor]:
    """A layer's tensors under PEFT's keys; ``plain`` without a magnitude, as LoRA.

    Raises:
        ValueError: a layer that PEFT has nothing for.
    """
    if not plain:
        refuse_what_peft_lacks(layer)
    key = f"{PREFIX}{layer.name}."
    factors = (
        ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    tensors = {key + factors[0]: layer.lora_A, key + factors[1]: layer.lora_B}
    if plain:
        return tensors
    magnitude = layer.magnitude
    if layer.kind == "conv":
        magnitude = magnitude.view(1, -1, *[1] * (layer.lora_A.ndim - 2))
    return tensors | {f"{key}lora_magnitude_vector": magnitude}


def refuse_what_peft_lacks(layer: Layer) -> None:
    if layer.norm_axis == "in":
        raise ValueError(
            f"{layer.name} has a magnitude per input, which no layer with one per output can stand for: merge the "
            "adapter into its base model (dorac.files.merge_into, python -m dorac merge), or write plain LoRA"
        )
    if layer.magnitude is None or layer.lora_A is None:
        lacking = (
            "magnitude (it is plain LoRA)" if layer.magnitude is None else "factors (its magnitude alone is trained)"
        )
        raise ValueError(f"{layer.name} has no {lacking}: the base model is needed to complete it (--base)")


def config_of(layers: tuple[Layer, ...], more: Mapping[str, object], *, use_dora: bool = True) -> dict:
    """A ``LoraConfig`` for layers of any ranks and scalings, as a dictionary."""
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: layer.scaling * layer.rank for layer in layers}
    r, lora_alpha = _usual(ranks), _usual(alphas)
    config = {
        "peft_type": "LORA",
        "use_dora": use_dora,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": _differing(ranks, r),
        "alpha_pattern": _differing(alphas, lora_alpha),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
    return config | {key: value for key, value in more.items() if key in ("task_type", "base_model_name_or_path")}


def _usual(values: Mapping[str, float]) -> float:
    values = list(values.values())
    return max(dict.fromkeys(values), key=values.count)


def _differing(values: Mapping[str, float], usual: float) -> dict[str, float]:
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def files(contents: Contents, *, plain: bool = False) -> tuple[dict[str, object], dict[str, str]]:
    """The two files by their names, and the metadata of the weights; ``plain`` those of LoRA."""
    tensors = {key: t for layer in contents.layers for key, t in tensors_of(layer, plain=plain).items()}
    config = config_of(contents.layers, contents.config, use_dora=not plain)
    return {"adapter_model.safetensors": tensors, CONFIG_NAME: config}, {"format": "pt"}
