"""How an op body learns who is calling it.

The public ops are CompositeImplicitAutograd: their Python body runs below Dynamo and above autograd, and picks per call
between an ``autograd.Function`` over leaf ops and plain aten. The probes are gathered here because two of them are not
public in torch; ``tests/test_front.py`` fails if torch moves them.
"""

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_EAGER = (Tensor, torch.nn.Parameter)
_TRACED = (*_EAGER, FunctionalTensor, FakeTensor)


def under_transform() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode level is active (both differentiate plain aten only)."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether ``torch.export`` is tracing or decomposing: the program must hold aten ops only, to run without dorac."""
    if torch.compiler.is_exporting():
        return True
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return mode is not None and mode.export


def all_eager(*tensors: Tensor | None) -> bool:
    """Whether every tensor is a plain eager tensor (no subclass such as DTensor, not being traced).

    A tensor wrapped by a transform looks plain too: ask :func:`under_transform` first.
    """
    return all(t is None or type(t) in _EAGER for t in tensors)


def all_plain(*tensors: Tensor | None) -> bool:
    """Whether every tensor is plain or the compiler's stand-in for a plain one (no other subclass such as DTensor)."""
    return all(t is None or type(t) in _TRACED for t in tensors)


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast disabled for the tensor's device, or nothing where it is off: export records even a no-op autocast."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
