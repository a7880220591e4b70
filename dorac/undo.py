"""``Undo``: writes to a model that are taken back, bit for bit, if anything is raised before all of them are made."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from dorac.ops import sharded


class State:
    """An object that a module has, whose attributes :meth:`Undo.keep_module` restores as those of the module."""


class Undo:
    """A log of what a block changes: whatever leaves the block by an exception, what the log was told of is restored.

        with Undo() as log:
            log.keep(weight)
            weight.copy_(other)
            log.keep_module(layer)
            layer.register_buffer("norm", norm)

    Tell it *before* each change. A failure while the log is told leaves nothing to restore of that change.
    """

    def __init__(self) -> None:
        # Each sets something to what it was, however often it is called.
        self._steps: list[Callable[[], object]] = []
        self._room: dict[torch.device, float] = {}  # bytes that copies may still take on a CUDA device

    def keep(self, *tensors: Tensor | None) -> None:
        """The elements of tensors that are to be written in place, in a copy; of a DTensor this rank's.

        On a CUDA device copies take at most half of the memory that was free there at the first, the others go to the
        host: where the block's own work fits without a log, the log does not make it fail.
        """
        for tensor in tensors:
            if tensor is not None:
                with torch.no_grad():
                    memory = tensor.to_local() if sharded.any_sharded(tensor) else tensor
                    if not _is_read_only(memory):
                        self._steps.append(partial(memory.copy_, self._copy(memory)))

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.detach().clone()
        if tensor.device not in self._room:
            self._room[tensor.device] = torch.cuda.mem_get_info(tensor.device)[0] / 2
        if tensor.nbytes > self._room[tensor.device]:
            return tensor.detach().to("cpu", copy=True)
        self._room[tensor.device] -= tensor.nbytes
        return tensor.detach().clone()

    def keep_requires_grad(self, tensors: Iterable[Tensor]) -> None:
        """Whether these require a gradient."""
        self._steps += [partial(_set_requires_grad, t, t.requires_grad) for t in tensors]

    def keep_module(self, *modules: nn.Module) -> None:
        """Which attributes, parameters, buffers, children and hooks these have; not what is in the tensors."""
        for module in modules:
            attributes = dict(vars(module))
            values = [vars(v) if isinstance(v, State) else v for v in attributes.values()]
            registries = [(v, v.copy()) for v in values if type(v) in (dict, OrderedDict, set, list)]
            self._steps.append(partial(_restore_module, module, attributes, registries))

    def keep_attribute(self, owner: object, name: str) -> None:
        """What ``owner.name`` is: a module's ``__class__``, a parameter's ``data`` (the memory, not what is in it)."""
        self._steps.append(partial(setattr, owner, name, getattr(owner, name)))

    def add(self, step: Callable[[], object]) -> None:
        """A step that sets something to what it was; it is called for changes that were not made, too, and twice."""
        self._steps.append(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.roll_back()

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restores everything that the log was told of."""
        failed = interrupted = None
        while self._steps:
            try:
                try:
                    self._steps[-1]()
                except Exception as error:  # one that cannot be undone keeps no other from it
                    failed = failed or error
                self._steps.pop()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None and sys.exc_info()[1] is None:  # else a second one, while the first is answered
            raise interrupted
        if failed is not None:
            raise failed


def _is_read_only(tensor: Tensor) -> bool:
    """Whether the tensor was made in inference mode, outside which torch lets nobody write it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()


def _set_requires_grad(tensor: Tensor, value: bool) -> None:
    with torch.inference_mode(tensor.is_inference()):
        tensor.requires_grad_(value)


def _restore_module(module: nn.Module, attributes: dict, registries: list[tuple]) -> None:
    for registry, content in registries:
        registry.clear()
        (registry.extend if isinstance(registry, list) else registry.update)(content)
    vars(module).clear()
    vars(module).update(attributes)
