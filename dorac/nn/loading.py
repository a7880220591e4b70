"""``load_state_dict`` of a model with DoRA layers: all of it is loaded, or nothing is.

The model that was wrapped has a ``load_state_dict`` of its own: whatever is raised in it, every tensor is what it was.
Where another module is told to load, one that holds the model or is a part of it (``torch.compile``'s, DDP's), torch
walks over the modules without asking, and what it has loaded stays. Then a hook of the model at least refuses what does
not fit before anything is written to it.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dorac.dense import PLAIN
from dorac.nn import norm_cache
from dorac.nn.layer import DoraLayer
from dorac.undo import Undo

_GUARD = "dora_loading_guard"  # where a module holds the handle of its hook
_STOCK = nn.Module._load_from_state_dict
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def guard(root: nn.Module) -> None:
    """Has ``load_state_dict`` of this module load all or nothing; a second call does nothing."""
    if not is_guarded(root) and not isinstance(root, DoraLayer):
        setattr(root, _GUARD, root.register_load_state_dict_pre_hook(_refuse_unfit))
        if "load_state_dict" not in vars(root):  # else somebody's own, who knows better
            root.load_state_dict = _AllOrNothing(root)


def unguard(module: nn.Module) -> None:
    """Takes that back."""
    if is_guarded(module):
        getattr(module, _GUARD).remove()
        delattr(module, _GUARD)
        if isinstance(vars(module).get("load_state_dict"), _AllOrNothing):
            del module.load_state_dict


def is_guarded(module: nn.Module) -> bool:
    return _GUARD in vars(module)


class _AllOrNothing:
    """``load_state_dict`` of a module, taken back where it raises.

    It keeps copies of what is going to be written, until it is done. What the state dict brings as it is already, the
    frozen weights of a checkpoint of the whole model, needs none. With ``strict=False`` a state dict of all that can
    have changed lacks nothing: frozen weights are no ``missing_keys`` of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # a cycle would keep a dropped model until the garbage is collected

    def __call__(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> object:
        module = self._module()
        assign = kwargs.get("assign", len(args) > 1 and args[1])  # torch's third; a class may have its own signature
        strict = kwargs.get("strict", args[0] if args else True)
        with Undo() as log:
            keep_all(module, state_dict, assign, log)
            result = type(module).load_state_dict(module, state_dict, *args, **kwargs)
        if not strict and getattr(result, "missing_keys", None) and trained_names(module) <= state_dict.keys():
            result.missing_keys.clear()
        return result

    def __reduce__(self) -> tuple:
        return type(self), (self._module(),)  # of a copy: the copy


def trained_names(root: nn.Module) -> set[str]:
    """The keys of a state dict that can have other values than when the model was wrapped.

    Adapters, frozen ones too, since they start at random; parameters that are trained; buffers of the rest.
    """
    layers = {module for module in root.modules() if isinstance(module, DoraLayer)}
    adapted = {part for layer in layers for part in layer.modules()}
    names = set()
    for prefix, module in root.named_modules(remove_duplicate=False):
        keys = [key for key, p in module._parameters.items() if p is not None and (module in layers or p.requires_grad)]
        if module not in adapted:
            keys += [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        names.update(f"{prefix}.{key}" if prefix else key for key in keys)
    return names


def keep_all(root: nn.Module, state_dict: Mapping[str, Any], assign: bool, log: Undo) -> None:
    """Tells the log of every tensor that loading may write; with ``assign`` torch puts others in their place."""
    log.keep_module(*root.modules())
    by_name = isinstance(state_dict, Mapping) and not _other_hooks(root)
    kept = set()
    for name, module in root.named_modules(remove_duplicate=False):
        as_named = by_name and type(module)._load_from_state_dict is _STOCK
        if as_named and assign:
            continue
        tensors = {**module._parameters, **module._buffers}
        if isinstance(module, DoraLayer):  # a magnitude may follow its weight, and a norm both
            tensors["kept norm"] = norm_cache.kept_norm(module)
        for key, tensor in tensors.items():
            value = state_dict.get(f"{name}.{key}" if name else key, tensor) if as_named else None
            if tensor is not None and id(tensor) not in kept and value is not tensor and not _same(tensor, value):
                kept.add(id(tensor))
                log.keep(tensor)


def _other_hooks(root: nn.Module) -> bool:
    """Whether another hook may yet change what is loaded: names, sizes."""
    return any(len(module._load_state_dict_pre_hooks) > is_guarded(module) for module in root.modules())


def _same(tensor: Tensor, value: object) -> bool:
    """Whether ``value`` is known to hold what ``tensor`` does, so that loading it changes nothing."""
    if type(tensor) not in PLAIN or type(value) not in PLAIN or tensor.is_meta or value.is_meta:
        return False
    bits = _BITS.get(tensor.dtype.itemsize)
    if bits is None or tensor.dtype != value.dtype or tensor.shape != value.shape or tensor.layout != value.layout:
        return False
    return torch.equal(tensor.detach().view(bits), value.detach().to(tensor.device).view(bits))


def _refuse_unfit(
    root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: dict, *_: object
) -> None:
    """Refuses a state dict for a merged layer, or one with a size that does not fit a DoRA layer.

    torch's own walk copies everything that fits first, and raises then.
    """
    layers = [(n, m) for n, m in root.named_modules(remove_duplicate=False) if isinstance(m, DoraLayer)]
    for name, layer in layers:
        layer.refuse_loading(f"{prefix}{name}", state_dict)
    if _other_hooks(root):
        return  # which may yet make the tensors fit
    misfits = []
    for name, layer in layers:
        for part, module in layer.named_modules(prefix=f"{prefix}{name}"):
            if type(module)._load_from_state_dict not in (_STOCK, DoraLayer._load_from_state_dict):
                continue  # it may take other sizes
            for key, parameter in module.named_parameters(part, recurse=False):
                found = state_dict.get(key)
                if isinstance(found, Tensor) and found.shape != parameter.shape:
                    misfits.append(
                        f"size mismatch for {key}: copying a param with shape {found.shape} from checkpoint, the shape "
                        f"in current model is {parameter.shape}."
                    )
    if misfits:
        listed = "\n\t".join(misfits)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t{listed}")
