"""``save_pretrained`` of a wrapped model: adapter files, and in a folder of transformers' Trainer what it resumes from.

The libraries' own would write the wrappers' names, ``...base_layer.weight``, which their ``from_pretrained`` does not
know: the model would come back with random weights.
"""

import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dorac import callers
from dorac.names import plain_name
from dorac.nn import DoraLayer
from dorac.nn.loading import trained_names
from dorac.ops import sharded
from dorac.places import dora_layers
from dorac.undo import Undo

_LIBRARIES = ("transformers", "diffusers", "huggingface_hub")
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # the folders that transformers' Trainer resumes from
_TRAINER_WEIGHTS = "model.safetensors"  # the file that it takes the model's state from there
# What the libraries' save_pretrained can do and this one cannot, with the value that asks for it.
_REFUSED = {"push_to_hub": True, "distributed_checkpoint": True, "safe_serialization": False}


def install(root: nn.Module, saved: Sequence[str], attribute: str, log: Undo) -> None:
    """Gives the modules below ``root`` that hold DoRA layers and a library's ``save_pretrained`` one of this kind.

    ``attribute`` is where a module remembers the names, within it, of those that are ``saved`` whole.
    """
    for name, module in root.named_modules():
        if _is_pretrained(module) and any(isinstance(part, DoraLayer) for part in module.modules()):
            log.keep_module(module)
            prefix = f"{name}." if name else ""
            own = [other.removeprefix(prefix) for other in saved if other.startswith(prefix)]
            setattr(module, attribute, list(dict.fromkeys([*vars(module).get(attribute, []), *own])))
            if "save_pretrained" not in vars(module):  # else somebody's own, who knows better
                module.save_pretrained = SavePretrained(module)
            if getattr(module, "is_quantized", False) and hasattr(type(module), "_hf_peft_config_loaded"):
                module._hf_peft_config_loaded = True  # adapters are attached, by which Trainer takes a quantised model


def remove(module: nn.Module) -> None:
    """Takes that back, but for the names."""
    if is_installed(module):
        del module.save_pretrained
        vars(module).pop("_hf_peft_config_loaded", None)


def is_installed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("save_pretrained"), SavePretrained)


def _is_pretrained(module: nn.Module) -> bool:
    classes = (cls for cls in type(module).__mro__ if "save_pretrained" in vars(cls))
    return any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in classes)


class SavePretrained:
    """``save_pretrained`` of a module with DoRA layers: :func:`dorac.save_adapter` with the libraries' arguments.

    Args:
        save_directory: where PEFT's two files go. In a folder ``checkpoint-<number>``, from which transformers'
            ``Trainer`` resumes, a third file, ``model.safetensors``, holds what of the model's state dict can have
            changed: adapters, whatever else is trained, and buffers.
        is_main_process: whether this process writes. Of a sharded model, every process calls this.
        state_dict: the state dict of the module as a trainer has gathered it, from which values are taken then. With an
            empty one nothing is written, and a ``RuntimeWarning`` says so.

    Other arguments of the libraries' have no meaning here.

    Raises:
        ValueError: a merged adapter, ``push_to_hub=True``, a ``variant`` and other ways to write that adapters do not
            have; a folder ``checkpoint-<number>`` that holds a whole model. What :func:`dorac.save_adapter` raises.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # a cycle would keep a dropped model until the garbage is collected

    def __reduce__(self) -> tuple:
        return type(self), (self._module(),)  # of a copy: the copy

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        import dorac  # saving lies a floor above wrapping

        module = self._module()
        if module is None:
            raise ReferenceError("the model is gone: keep it in a variable while it is saved")
        directory = Path(save_directory)
        resumable = bool(_CHECKPOINT.fullmatch(directory.name))
        _refuse(module, directory if resumable else None, options)
        if state_dict is not None and not state_dict:
            callers.warn(
                f"nothing was saved in {directory}: the state dict is empty. DeepSpeed's ZeRO-3 gathers one with "
                "stage3_gather_16bit_weights_on_model_save",
            )
            return
        gathers = state_dict is None and sharded.any_sharded(*module.parameters())
        if not (is_main_process or gathers):
            return
        dorac.save_adapter(module, directory, state_dict=state_dict)
        if resumable:
            tensors = {key: _own(tensor) for key, tensor in trained_state(module, state_dict).items()}
            if is_main_process:
                save_file(tensors, directory / _TRAINER_WEIGHTS, metadata={"format": "pt"})


def _refuse(module: nn.Module, checkpoint: Path | None, options: Mapping[str, Any]) -> None:
    kind = type(module).__name__
    refused = [f"{name}={value}" for name, value in _REFUSED.items() if options.get(name) is value]
    if options.get("variant"):
        refused.append(f"variant={options['variant']!r}")
    if refused:
        raise ValueError(
            f"save_pretrained of {kind}, which holds DoRA layers, writes adapter files and takes no "
            f"{', '.join(refused)}; push_to_hub(repo_id) of the model uploads them"
        )
    merged = [name for name, layer in dora_layers(module).items() if layer.merged]
    if merged:
        raise ValueError(
            f"the adapter of {kind} is merged ({merged[0]}, ...): dorac.merge(model, unload=True) leaves the plain "
            "model, whose save_pretrained writes it; dorac.save_adapter(model, directory) writes the adapter"
        )
    if checkpoint is not None and Path(checkpoint, "config.json").exists():
        raise ValueError(f"{checkpoint} holds a whole model (config.json): save the adapter to another directory")


def trained_state(module: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What of a module's state dict can have changed since it was wrapped."""
    names = {plain_name(name) for name in trained_names(module)}
    state = module.state_dict() if state_dict is None else state_dict
    return {key: tensor for key, tensor in state.items() if plain_name(key) in names}


def _own(tensor: Tensor) -> Tensor:
    return sharded.whole(tensor.detach()).clone().contiguous()
