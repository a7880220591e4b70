"""Adapters that a model holds but does not run."""

import contextlib
import dataclasses
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dorac import offload
from dorac.dense import not_dense
from dorac.nn import DoraLayer, shared
from dorac.ops import sharded
from dorac.wrapped import bare, require_layers

# Operations that take no more of a tensor than its shape, dtype and device.
_PROTOTYPE = re.compile(r"aten::(\w+_like|new_\w+)")


def find_idle(model: nn.Module, *args, **kwargs) -> dict[str, str]:
    """Runs ``model(*args, **kwargs)`` forward and backward and names the adapters that do not take part.

    An adapter is idle if no gradient reaches its trainable parameters: its layer was not called, or its weight was read
    past its forward (``F.linear(x, self.proj.weight)`` in the parent), which does not see the adapter. What inputs do
    not reach (an expert without tokens, a layer that LayerDrop leaves out in training mode) is named too: the answer
    is one about these inputs and the mode that the model is in. Layers that took part and whose weight is *also* read
    past their forward are named as such: merging changes what that reading computes.

    Nothing of it stays: no gradients, hooks or changed buffers, and the random number generators go on where they were.
    Compiled models run in eager. Every floating-point tensor of the output is differentiated, in tuples, lists, dicts
    and dataclasses.

    Args:
        model: one with adapted layers that are not merged. args, kwargs: what it is called with.

    Returns:
        From the names of the layers to the reason; empty if all take part. Layers without a trainable parameter are
        left out.

    Raises:
        ValueError: no adapter in the model, a merged one, or sharded parameters (call this before sharding).
        TypeError: no floating-point tensor in the output.
        RuntimeError: torch cannot differentiate only some parameters through reentrant checkpointing; switch to
            ``use_reentrant=False``.
    """
    model = bare(model)
    names: dict[DoraLayer, str] = {}
    for name, layer in require_layers(model).items():
        names.setdefault(layer, name or type(layer).__name__)
        if layer.merged:
            raise ValueError(f"{names[layer]} is merged: its adapter cannot take part; unmerge it first")
        if sharded.any_sharded(*layer.parameters()):
            raise ValueError(f"{names[layer]} is sharded (DTensor): look for idle adapters before sharding")
    trained = {layer: [p for p in layer.parameters(recurse=False) if p.requires_grad] for layer in names}
    trained = {layer: parameters for layer, parameters in trained.items() if parameters}

    uses = _WeightUses(names)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _random_state_kept(model), torch.inference_mode(False), torch.enable_grad():
        with torch.compiler.set_stance("force_eager"), shared.apart(), uses:
            output = torch.func.functional_call(model, buffers, args, kwargs)
        reached = _reached([p for parameters in trained.values() for p in parameters], output)

    found = {}
    for layer, parameters in trained.items():
        idle, read = reached.isdisjoint(map(id, parameters)), uses.past.get(layer)
        if idle and layer in uses.called:
            found[names[layer]] = "it was called, but no gradient reached its adapter"
        elif idle:
            found[names[layer]] = f"its weight is read past its forward: {read}" if read else "it was not called"
        elif read:
            found[names[layer]] = f"it took part, but its weight is also read past its forward: {read}"
    return found


def _reached(parameters: list[nn.Parameter], output: object) -> set[int]:
    """The ids of the parameters that gradients of the output reach."""
    tensors = [t for t in _tensors(output) if t.is_floating_point() or t.is_complex()]
    if not tensors:
        raise TypeError(
            "the model must return floating-point tensors, in tuples, lists, dicts or dataclasses, for gradients to "
            f"start from, got {type(output).__name__}"
        )
    starts = [t for t in tensors if t.requires_grad]
    if not starts:
        return set()
    gradients = torch.autograd.grad(starts, parameters, [torch.ones_like(t) for t in starts], allow_unused=True)
    return {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leaves the generators of torch, Python and NumPy as they were; LayerDrop and masking take from any of them."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    devices: dict[str, set[torch.device]] = {}
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            devices.setdefault(parameter.device.type, set()).add(parameter.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind, found in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=found, device_type=kind))
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpy_state)


class _WeightUses(TorchDispatchMode):
    """Who computes with the base weights: a layer's own forward (``called``), or others (``past``, with the place).

    Below autograd every view of a weight still has its memory, and asking for metadata is no operation, or one that
    gives a view or a new tensor of that kind.
    """

    def __init__(self, layers: Iterable[DoraLayer]) -> None:
        super().__init__()
        self.called: set[DoraLayer] = set()
        self.past: dict[DoraLayer, str] = {}
        # By storage, where a weight begins and ends: many may share one.
        self.spans: dict[int, list[tuple[int, int, DoraLayer]]] = {}
        for layer in layers:
            for weight in _weights(layer):
                storage, begin = _place(weight)
                end = begin + max(1, weight.numel() * weight.element_size())
                self.spans.setdefault(storage, []).append((begin, end, layer))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or _PROTOTYPE.fullmatch(func._schema.name)):
            for tensor in _tensors((args, kwargs or {})):
                layers = self._holders(tensor)
                if layers:
                    self._note(layers)
        return func(*args, **kwargs or {})

    def _holders(self, tensor: Tensor) -> set[DoraLayer]:
        """The layers whose base weight, or a view of it, ``tensor`` is."""
        storage, address = _place(tensor)
        return {layer for begin, end, layer in self.spans.get(storage, ()) if begin <= address < end}

    def _note(self, layers: set[DoraLayer]) -> None:
        reader = None
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, DoraLayer) and module in layers:
                self.called.add(module)
                return
            if reader is None and isinstance(module, nn.Module):
                reader, code = module, frame.f_code
                where = f"{type(module).__name__}.{code.co_name}, {os.path.basename(code.co_filename)}:{frame.f_lineno}"
            frame = frame.f_back
        if reader is None:
            return
        # A module that holds the weight itself is tied to it, as the head of a language model to its embedding.
        tied = set().union(*(self._holders(p) for p in reader.parameters(recurse=False)))
        for layer in layers - tied:
            self.past.setdefault(layer, where)


def _weights(layer: DoraLayer) -> Iterator[Tensor]:
    """The base weights; of offloaded ones the tensors on the host that they come from, none where there is none."""
    originals = offload.originals(layer.base_layer)
    for name, parameter in layer.named_base_weights().items():
        weight = originals.get(name, parameter)
        if weight is not None:
            yield weight


def _place(tensor: Tensor) -> tuple[int, int]:
    """A tensor's storage, which its views share (on meta too), and where in memory it begins."""
    if not_dense(tensor) or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return id(tensor), 0
    return tensor.untyped_storage()._cdata, tensor.data_ptr()
