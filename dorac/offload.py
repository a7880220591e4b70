"""Modules whose tensors accelerate keeps elsewhere between forwards, on the host or on disk, and ``meta`` in the model.

``cpu_offload``, ``disk_offload``, ``dispatch_model`` and ``device_map="auto"`` put a hook on every module that has
tensors (``module._hf_hook``). It stands around the module's forward: it brings the tensors in as new parameters, moves
the inputs to them, and takes the tensors away again. Whoever reads a module's weight without calling the module has to
do what the hook does; that is here. accelerate is not imported: its hooks come with the modules.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dorac.undo import Undo

ON_DISK = (
    "it is offloaded to disk, where nothing is written: take accelerate's hooks off first "
    "(accelerate.hooks.remove_hook_from_submodules(model)), or dispatch it with a device_map without 'disk'"
)
UNKEPT = (
    "it is offloaded to disk, from where each forward reads the weight anew: leave its norm to the forward, or "
    "dispatch the model with a device_map without 'disk'"
)
LOAD_BEFORE = (
    "the adapter is offloaded by accelerate, and loading a state dict writes nothing there: load before the model is "
    "dispatched, or take the hooks off first (accelerate.hooks.remove_hook_from_submodules(model))"
)
_ON_MODULE = ("_hf_hook", "_old_forward", "forward")  # what accelerate puts on a module


def is_hooked(module: nn.Module) -> bool:
    """Whether one of accelerate's hooks stands around the module's forward."""
    return "_hf_hook" in module.__dict__


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than that of its class stands on the module, hooks of accelerate's aside.

    What they have replaced stays there when they are taken off.
    """
    forward = vars(module).get("_old_forward" if is_hooked(module) else "forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _offloading(module: nn.Module) -> object | None:
    """The hook that brings the module's tensors in and takes them away again, if it has one."""
    hook = vars(module).get("_hf_hook")
    for part in getattr(hook, "hooks", [hook]):  # of a SequentialHook
        if getattr(part, "offload", False):
            return part
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own tensors elsewhere between forwards."""
    return _offloading(module) is not None


def inside_others(model: nn.Module) -> dict[str, str]:
    """Why nothing can be done with modules that accelerate brings in with an outer one as a whole, by their names."""
    found = {}
    for outer, module in model.named_modules():
        hook = _offloading(module)
        if hook is not None and hook.place_submodules:
            inner = (name for name, child in module.named_modules(prefix=outer) if child is not module)
            kind = type(module).__name__
            reason = f"is offloaded as a part of {outer or kind}: leave {kind} out of preload_module_classes"
            found |= dict.fromkeys(inner, reason)
    return found


def name_of(module: nn.Module) -> str:
    """The name of an offloaded module in the model that was dispatched, or else its class."""
    prefix = getattr(getattr(_offloading(module), "weights_map", None), "prefix", "")
    return prefix.rstrip(".") or type(module).__name__


def originals(module: nn.Module) -> dict[str, Tensor | None]:
    """Of an offloaded module's parameters the tensors on the host that they are copies of, None for those on disk."""
    hook = _offloading(module)
    if hook is None:
        return {}
    prefix = getattr(hook.weights_map, "prefix", "")
    loader = getattr(hook.weights_map, "dataset", hook.weights_map)
    on_host = getattr(loader, "state_dict", loader)
    names = [name for name, _ in module.named_parameters(recurse=hook.place_submodules)]
    return {name: on_host.get(f"{prefix}{name}") for name in names}


def is_on_disk(module: nn.Module) -> bool:
    """Whether a parameter of the module is offloaded to disk."""
    return any(tensor is None for tensor in originals(module).values())


@contextlib.contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """The module without its hook, which is not told; its tensors are where they are."""
    attributes = vars(module)
    hidden = {name: attributes.pop(name) for name in _ON_MODULE if name in attributes} if is_hooked(module) else {}
    try:
        yield
    finally:
        attributes.update(hidden)


@contextlib.contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """The module as it is without a hook: its tensors where they compute, its own forward."""
    hook = _offloading(module)
    if hook is not None and not any(p.is_meta for p in module.parameters(recurse=hook.place_submodules)):
        hook = None  # somebody else has brought them in, and takes them away
    if hook is not None:
        _bring_in(hook, module)
    try:
        with bare(module):
            yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def _bring_in(hook: object, module: nn.Module) -> None:
    try:
        hook.pre_forward(module)
    except BaseException as error:
        hook.post_forward(module, None)  # what it has brought in by then
        if not isinstance(error, KeyError):
            raise
        raise RuntimeError(
            f"{name_of(module)}: accelerate has no value for {error}, which it offloads (PEFT's from_pretrained tells "
            "it of no magnitude that goes to disk): dispatch the base model, adapt it with get_peft_model, and load "
            "the adapter with load_adapter"
        ) from None


def put_away(module: nn.Module) -> None:
    """The tensors of an offloaded module away, as after its forward."""
    if any(not p.is_meta for p in module.parameters(recurse=False)):
        _offloading(module).post_forward(module, None)


@contextlib.contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """The tensors of those modules that are offloaded, there for the block; what it writes to them may get lost."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if is_offloaded(module):
                stack.enter_context(plain(module))
        yield


@contextlib.contextmanager
def written(log: Undo, *modules: nn.Module) -> Iterator[None]:
    """As :func:`onloaded`, and what the block writes is kept. The log takes it back.

    Raises:
        ValueError: a module is offloaded to disk.
    """
    for module in modules:
        if is_on_disk(module):
            raise ValueError(f"{name_of(module)}: {ON_DISK}")
        if is_offloaded(module):
            log.keep(*originals(module).values())
            log.keep_module(module)
    kept = {module: originals(module) for module in modules}
    with onloaded(*modules):
        yield
        with torch.no_grad():
            for module, tensors in kept.items():
                for name, tensor in tensors.items():
                    tensor.copy_(module.get_parameter(name))
