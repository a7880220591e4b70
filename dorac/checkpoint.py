"""Adapters on disk in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import collections
import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dorac.apply import bare, dora_layers, find_saved, refuse_ddp, require_layers, reshard, saved_modules, wrap
from dorac.nn import DoraLayer, layer_class, norm_cache
from dorac.nn.kinds import KINDS
from dorac.nn.layer import check_hyperparameters, scaling_factor
from dorac.ops import sharded
from dorac.targets import Target, check_names, find_targets, from_pattern, matches, named_places, plain_name
from dorac.undo import Undo

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_ENDINGS = tuple({key for kind in KINDS for key in kind.PEFT_KEYS.values()})
# What a config may say: these are honoured ...
_HONOURED = {"peft_type", "use_dora", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"}
_HONOURED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
# ... and these have no influence on what the adapter computes. Everything else must be unset.
_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
_NEUTRAL |= {
    "eva_config",
    "fan_in_fan_out",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes the adapter of ``model`` so that :func:`load_adapter` and stock PEFT read it.

    ``adapter_model.safetensors`` holds ``base_model.model.<module>.lora_A.weight`` and ``.lora_B.weight`` (of an
    embedding ``.lora_embedding_A`` and ``.lora_embedding_B``) and ``.lora_magnitude_vector`` in their own dtypes (and
    the modules in ``modules_to_save``), ``adapter_config.json`` the ``LoraConfig`` with ``use_dora``. Each file is
    written beside its place and then moved there, so that an interruption leaves the previous one whole. Whether the
    adapter is merged makes no difference. PEFT has no convolutions with a grouped lora_A: only :func:`load_adapter`
    reads those. Of a sharded model every rank calls this and rank 0 writes.

    PEFT has no DoRA on experts: their keys ``<module>.<projection>.lora_A``, ``.lora_B`` and
    ``.lora_magnitude_vector`` are dorac's own, and only :func:`load_adapter` reads them.

    Raises:
        ValueError: no adapter in the model; layers that one config cannot describe (different dropout or rsLoRA
            settings).
        OSError: the directory cannot be made or written.
    """
    model = bare(model)
    layers = require_layers(model)
    _refuse_root(layers)
    config = _config(model, layers)
    reshard(model)
    parameters = _adapter_tensors(model, layers)
    tensors = {key: sharded.whole(t.detach()).clone().contiguous() for key, t in parameters.items()}
    if sharded.any_sharded(*parameters.values()) and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        try:
            save_file(tensors, Path(scratch, WEIGHTS_NAME), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS_NAME}: {error}") from None
        Path(scratch, CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(scratch, name), directory / name)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Reads an adapter written by :func:`save_adapter` or by PEFT into ``model``.

    A plain model is wrapped first, as the config says; a wrapped model must hold the same layers, ranks and scalings.
    Values are cast to the dtype of the parameters they go to. The base weight that PEFT adds to the file for an adapted
    token embedding or language-model head is read too, as PEFT does.

    Returns:
        The names of the modules that the adapter went to.

    Raises:
        FileNotFoundError: a missing file. ValueError: an unreadable file; a config that is not DoRA or asks for what
            dorac does not have; keys, shapes, ranks or scalings that do not fit, all of them listed. The model is then
            unchanged.
    """
    root, model = model, bare(model)
    reshard(model)
    config = _read_config(Path(directory, CONFIG_NAME))
    tensors = _read_tensors(Path(directory, WEIGHTS_NAME))
    layers = dora_layers(model)
    _refuse_root(layers)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"the model's adapter is merged ({merged[0]}, ...); unmerge it before loading another")

    if layers:
        targets, saved, problems = [], saved_modules(model), _setting_mismatches(layers, config)
        bases = {name: layer.base_layer for name, layer in layers.items()}
        expected = {key: t.shape for key, t in _adapter_tensors(model, layers).items()}
    else:
        refuse_ddp(root)
        # PEFT names every usual classifier head in modules_to_save; what is saved too little shows in the keys.
        saved, problems = find_saved(model, config.get("modules_to_save") or [], all_needed=False), []
        targets = find_targets(
            model,
            config["target_modules"],
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
            rank_pattern=config.get("rank_pattern"),
            alpha_pattern=config.get("alpha_pattern"),
            saved=saved,
        )
        targets = [_laid_out(target, tensors) for target in targets]
        bases = {target.name: target.module for target in targets}
        expected = {}
        for target in targets:
            cls = layer_class(target.module)
            shapes = cls.adapter_shapes(target.module, target.r, **target.layout)
            expected |= {_key(target.name, cls.PEFT_KEYS[name]): shape for name, shape in shapes.items()}
        expected |= {key: t.shape for key, t in _saved_tensors(model, saved).items()}

    base_tensors = {_key(name, f"base_layer.{k}"): p for name, m in bases.items() for k, p in m.named_parameters()}
    base_tensors = {key: p for key, p in base_tensors.items() if key in tensors}
    expected |= {key: p.shape for key, p in base_tensors.items()}
    problems += [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    problems += [
        f"shape of {key}: the model has {list(shape)}, the file {list(tensors[key].shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += [
        f"dtype of {key}: {t.dtype}"
        for key, t in tensors.items()
        if key.endswith(_ENDINGS) and not t.is_floating_point()
    ]
    if problems:
        more = [f"... and {len(problems) - 50} more"] if len(problems) > 50 else []
        raise ValueError(f"the adapter in {directory} does not fit the model:\n  " + "\n  ".join(problems[:50] + more))

    with Undo() as log:
        if targets:
            wrap(
                model,
                targets,
                saved,
                log,
                lora_dropout=config.get("lora_dropout") or 0.0,
                use_rslora=bool(config.get("use_rslora")),
            )
            layers = dora_layers(model)
        with torch.no_grad():
            for key, parameter in (_adapter_tensors(model, layers) | base_tensors).items():
                log.keep(parameter)
                parameter.copy_(sharded.like(tensors[key], parameter))
        for layer in layers.values():
            layer.keep_norm(log)
        norm_cache.refresh(layers.values())
    return list(layers)


def _key(module: str, name: str) -> str:
    """PEFT's key of a tensor of a module, whether that is compiled or not."""
    return _PREFIX + plain_name(f"{module}.{name}")


def _laid_out(target: Target, tensors: dict[str, Tensor]) -> Target:
    """The target with the layout that the file's tensors for it have."""
    cls = layer_class(target.module)
    keys = {name: _key(target.name, key) for name, key in cls.PEFT_KEYS.items()}
    present = {name: tensors[key] for name, key in keys.items() if key in tensors}
    return dataclasses.replace(target, layout=cls.layout_of(target.module, present))


def _adapter_tensors(model: nn.Module, layers: dict[str, DoraLayer]) -> dict[str, Tensor]:
    """The model's own tensors under PEFT's keys."""
    adapters = {
        _key(name, key): getattr(layer, attribute)
        for name, layer in layers.items()
        for attribute, key in layer.PEFT_KEYS.items()
    }
    return adapters | _saved_tensors(model, saved_modules(model))


def _saved_tensors(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    return {
        _key(name, key): tensor
        for name in saved
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()
    }


def _config(model: nn.Module, layers: dict[str, DoraLayer]) -> dict:
    """The ``LoraConfig`` that describes the wrapped layers, as a dictionary."""

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

    r, rank_pattern = usual_and_pattern(lambda layer: layer.r)
    lora_alpha, alpha_pattern = usual_and_pattern(_lora_alpha)
    return {
        "peft_type": "LORA",
        "use_dora": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "task_type": None,
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
    }


def _lora_alpha(layer: DoraLayer) -> float:
    """The alpha of the layer's scaling, which may have been set since it was made."""
    scaling = float(layer.scaling)
    if scaling == scaling_factor(layer.r, layer.lora_alpha, layer.use_rslora):
        return layer.lora_alpha
    return scaling / scaling_factor(layer.r, 1, layer.use_rslora)


def _shortest_names(model: nn.Module, layers: dict[str, DoraLayer]) -> list[str] | str:
    """The last parts of the wrapped modules' names, or else their full names, or else a regex: what names no other."""
    plain = [plain_name(name) for name in layers]
    endings = sorted({name.rpartition(".")[2] for name in plain})
    inside = tuple(f"{name}." for name in layers)
    others = {plain_name(name) for name, _ in named_places(model) if not name.startswith(inside)} - set(plain)
    for names in (endings, plain):
        if not any(matches(names, other) for other in others):
            return names
    return "|".join(map(re.escape, plain))


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not config.get("use_dora"):
        raise ValueError(f"{path} does not describe a DoRA adapter (peft_type 'LORA' with use_dora true)")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    foreign = {
        k: v for k, v in config.items() if k not in _HONOURED | _NEUTRAL and v and not (k == "bias" and v == "none")
    }
    if foreign:
        raise ValueError(
            f"{path} asks for what dorac does not have: {', '.join(f'{k}={v!r}' for k, v in sorted(foreign.items()))}"
        )
    if config.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} changes base weights, which dorac does not redo"
        )
    try:
        check_names("target_modules", config["target_modules"])
        for r in (config["r"], *(config.get("rank_pattern") or {}).values()):
            check_hyperparameters(r, 1, config.get("lora_dropout") or 0.0, True, None)
        for lora_alpha in (config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()):
            check_hyperparameters(1, lora_alpha, 0.0, True, None)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _refuse_root(layers: dict[str, DoraLayer]) -> None:
    if "" in layers:
        kind = type(layers[""]).__name__
        raise ValueError(f"the model is itself a {kind}, which PEFT's keys cannot name; pass a model that holds it")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path.parent}")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _setting_mismatches(layers: dict[str, DoraLayer], config: dict) -> list[str]:
    """Where the scaling of a wrapped model is not the one that the adapter was trained with."""
    problems = []
    for name, layer in layers.items():
        plain = plain_name(name)
        r = from_pattern("rank_pattern", config.get("rank_pattern"), plain, config["r"])
        lora_alpha = from_pattern("alpha_pattern", config.get("alpha_pattern"), plain, config["lora_alpha"])
        scaling = scaling_factor(r, lora_alpha, bool(config.get("use_rslora")))
        if not math.isclose(scaling, layer.scaling, rel_tol=1e-12):
            problems.append(f"scaling of {name}: the model has {layer.scaling:g}, the file {scaling:g}")
    return problems
