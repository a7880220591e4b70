"""``load_state_dict`` of a model with DoRA layers: what it refuses, it refuses before it has written anything."""

from collections.abc import Mapping

from torch import Tensor, nn

from dorac.nn.layer import DoraLayer

_GUARD = "dora_loading_guard"  # where a module holds the handle of its hook
_STOCK = nn.Module._load_from_state_dict


def guard(root: nn.Module) -> None:
    """Lets ``load_state_dict`` of this module look at all its DoRA layers first; a second call does nothing."""
    if not is_guarded(root) and not isinstance(root, DoraLayer):
        setattr(root, _GUARD, root.register_load_state_dict_pre_hook(_refuse_unfit))


def unguard(module: nn.Module) -> None:
    """Takes that back."""
    if is_guarded(module):
        getattr(module, _GUARD).remove()
        delattr(module, _GUARD)


def is_guarded(module: nn.Module) -> bool:
    return _GUARD in vars(module)


def _refuse_unfit(
    root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: dict, *_: object
) -> None:
    """Refuses a state dict for a merged layer, or one with a size that does not fit a DoRA layer.

    torch's own walk copies everything that fits first, and raises then.
    """
    layers = [(n, m) for n, m in root.named_modules(remove_duplicate=False) if isinstance(m, DoraLayer)]
    for name, layer in layers:
        layer.refuse_loading(f"{prefix}{name}")
    if any(len(module._load_state_dict_pre_hooks) > is_guarded(module) for module in root.modules()):
        return  # another hook may yet make the tensors fit
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
