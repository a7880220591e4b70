"""How an op's body finds out what is calling it.

The public ops are CompositeImplicitAutograd: their Python body runs below Dynamo and above autograd, and picks per call
between an ``autograd.Function`` over leaf ops and plain aten. The probes are gathered here because some of them are not
public in torch; ``tests/test_front.py`` fails if torch moves them.
"""

import contextlib
import functools
import importlib.util

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from dorac.kernels import configs, target

_EAGER = (Tensor, torch.nn.Parameter)
_TRACED = (*_EAGER, FunctionalTensor, FakeTensor)
_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
_BATCHED_GRADIENTS = torch._C._parse_dispatch_key("VmapMode")  # of torch.autograd, whose vmap is not torch.func's


def unobserved(but_by_modes: bool = False) -> bool:
    """Whether nothing observes what is called now: no mode over torch's functions or ops, no transform, no tracer.

    Subclasses of tensors observe too; they are not looked for here. ``but_by_modes``: modes over ops, a tracer's among
    them, may be active.

    ``with torch.device(...)`` is a mode that only looks for functions without tensors.
    """
    return (
        not torch.compiler.is_compiling()
        and (but_by_modes or not torch._C._len_torch_dispatch_stack())
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)
        and not traced_by_jit()
        and (not torch._C._len_torch_function_stack() or _only_device_modes())
    )


def seen_by_modes_alone() -> bool:
    """Whether nothing observes but modes over ops that are no tracer's.

    Such modes log, count, or choose what a checkpoint saves.
    """
    return unobserved(but_by_modes=True) and not any(torch._C._get_dispatch_mode(key) for key in _TRACERS)


def _only_device_modes() -> bool:
    return all(type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def under_transform() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode level is active (both differentiate plain aten only)."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether ``torch.export`` is tracing or decomposing: the program must hold aten ops only, to run without dorac."""
    if torch.compiler.is_exporting():
        return True
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return mode is not None and mode.export


def exporting_module() -> bool:
    """As :func:`exporting`, for code that Dynamo traces: there torch 2.11 folds ``is_exporting()`` to True."""
    return torch.compiler._is_exporting_flag


def traced_by_jit() -> bool:
    """Whether ``torch.jit.trace`` records: what was computed before is a constant of its program."""
    return torch._C._get_tracing_state() is not None


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what runs now only records, and the host can read nothing."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def in_backward() -> bool:
    """Whether this runs within backward, as what a checkpoint computes again does."""
    return torch._C._current_graph_task_id() != -1


def keeps_graph() -> bool:
    """Within backward: whether it was asked to keep the graph, so that what is saved may be needed again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saves_for_itself() -> bool:
    """Whether autograd alone sees what is saved for backward: there are no hooks on it but a checkpoint's."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or hooks[0].__module__ == _CHECKPOINT


_CHECKPOINT = "torch.utils.checkpoint"  # whose hooks give what was computed again, once


def all_eager(*tensors: Tensor | None) -> bool:
    """Whether every tensor is a plain eager tensor (no subclass such as DTensor, not being traced).

    A tensor wrapped by a transform looks plain too: ask :func:`under_transform` first.
    """
    return all(t is None or type(t) in _EAGER for t in tensors)


def all_plain(*tensors: Tensor | None) -> bool:
    """Whether every tensor is plain or the compiler's stand-in for a plain one (no other subclass such as DTensor)."""
    return all(t is None or type(t) in _TRACED for t in tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts the arguments of products on the tensor's device to, or None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast disabled for the tensor's device, or nothing where it is off: export records even a no-op autocast."""
    if autocast_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return why_aten(device) is None


def why_aten(device: torch.device) -> str | None:
    """Why kernels are not launched on the device, which may also be only a fake tensor's; None where all of them are.

    On AMD's cards they were compiled, but never run: there ``cards.launched_for`` has to enable them.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    card = target.of_device(device)
    why = configs.why_not(card)
    if why is None and torch.version.hip is not None and not target.is_given():
        return f"kernels for {card.name} were never run: dorac.ops.cards.launched_for(...) gives them by hand"
    return why


def has_kernels(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels take these tensors: on a GPU that they can be launched on, none of them float64.

    Everything else is computed in aten, with the same results.
    """
    return all(t is None or (t.is_cuda and t.dtype is not torch.float64 and _has_kernels(t.device)) for t in tensors)


@functools.cache
def _reads_packed(device: torch.device, float8: bool) -> bool:
    return configs.why_no_packed(target.of_device(device), float8) is None


def has_packed_kernels(*pieces: Tensor | None) -> bool:
    """Whether the kernels for packed weights take one that is stored in these, the first of them its numbers."""
    float8 = any(t is not None and t.dtype is torch.float8_e4m3fn for t in pieces)
    return has_kernels(pieces[0]) and _reads_packed(pieces[0].device, float8)


def at_most(size: int | torch.SymInt, limit: int) -> bool:
    """Whether ``size <= limit`` is known; a symbolic size that may be either is not specialised, the answer is no."""
    if isinstance(size, int):
        return size <= limit
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(size <= limit)
