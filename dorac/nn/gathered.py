"""The norms of layers whose parameters FSDP2 (``fully_shard``) gathers.

Between forwards such a layer holds parts of its parameters (DTensors). In the forward of the unit that it belongs to,
FSDP2 puts whole ones in their place, always the same objects, whose memory it frees and fills again. So a kept norm
(:mod:`dorac.nn.norm_cache`) is taken of the whole ones, without a collective, by a hook of the unit that runs behind
FSDP2's own and before compiled code, all of a unit's in one launch; and it is kept for as long as nobody has written to
the parts. Parameters that :mod:`dorac.parallel` has spread before are DTensors of that alone once FSDP2 has gathered
them; of a weight that is spread over its columns the norm takes its collective then.
"""

import contextlib
import operator
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dorac import packed
from dorac.nn import norm_cache
from dorac.nn.keeper import Keeper
from dorac.nn.moments import Moment, versions
from dorac.ops import front, sharded


class Parts:
    """What this rank holds of the tensors that a norm was taken of, and its state then."""

    __slots__ = ("states", "taken", "tensors", "watched")

    def __init__(self, tensors: Sequence[Tensor], *, taken: bool) -> None:
        self.tensors, self.taken = tuple(tensors), taken  # or the norm is due: see norm_cache.refresh
        with torch.no_grad():
            local = [t.to_local() for t in tensors if sharded.any_sharded(t)]
        self.watched = *tensors, *local  # a write counts in the version of the DTensor, or of its local tensor
        self.states = self._of()

    def _of(self) -> list[int | None]:
        return versions(self.watched)

    def passed(self) -> bool:
        """Whether they have been written to since."""
        return self._of() != self.states

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, taken: bool) -> "Parts":
        return cls(tensors, taken=taken)

    @staticmethod
    def moment(tensors: Sequence[Tensor], grad_mode: bool | None) -> "GatheredMoment":
        """That of the whole tensors, with the norm at their end."""
        return GatheredMoment(tensors, grad_mode)


class GatheredMoment(Moment):
    """That of the whole parameters: FSDP2 frees and fills their memory, which counts in no version."""

    __slots__ = ()

    def _of(self, tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
        return tuple(versions([tensors[i] for i in self.places]))

    def passed(self, tensors: Sequence[Tensor]) -> bool:
        return self._of(tensors) != self.state


def by_unit(model: nn.Module, layers: Iterable[Keeper]) -> dict[nn.Module, list[Keeper]]:
    """The layers whose parameters FSDP2 has sharded, by the innermost unit that holds them.

    Not those that are sharded otherwise, too, but for :mod:`dorac.parallel`: what FSDP2 gathers of them are shards.
    """
    fsdp, units = sys.modules.get("torch.distributed.fsdp"), {}
    if fsdp is None:
        return units
    unit_of: dict[nn.Module, nn.Module] = {}

    def walk(module: nn.Module, unit: nn.Module | None) -> None:
        unit = module if isinstance(module, fsdp.FSDPModule) else unit
        if unit is not None:
            unit_of[module] = unit
        for child in module.children():
            walk(child, unit)

    walk(model, None)
    for layer in layers:
        module = layer if isinstance(layer, nn.Module) else layer.layer
        tensors = [t for t in layer.norm_inputs() if sharded.any_sharded(t)]
        known = getattr(layer, "shards", None) is not None
        once = all(sum(not p.is_replicate() for p in t.placements) < 2 for t in tensors)
        if module in unit_of and tensors and (known or once) and norm_cache.out_of_reach(layer, tensors):
            units.setdefault(unit_of[module], []).append(layer)
    return units


def follow(units: Mapping[nn.Module, Sequence[Keeper]]) -> list[RemovableHandle]:
    """Has the norms of these layers, which are kept, taken in the forward of their units."""
    handles = []
    for unit, layers in units.items():
        for layer in layers:
            layer.kept.gathered = Parts(layer.norm_inputs(), taken=False)
        handles.append(unit.register_forward_pre_hook(torch.compiler.disable(_Hook(layers))))
    return handles


@contextlib.contextmanager
def whole(units: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of these units gathered for the block, as in their forward."""
    with contextlib.ExitStack() as stack:
        for unit in units:
            unit.unshard()
            stack.callback(unit.reshard)
        yield


class _Hook:
    def __init__(self, layers: Iterable[Keeper]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]

    def __call__(self, unit: nn.Module, args: tuple) -> None:
        if front.under_transform() or front.capturing():  # what they would compute now is not what is to be kept
            return
        changed, doubted = [], []
        for layer in (ref() for ref in self.layers):
            kept = None if layer is None else layer.kept
            if kept is None or kept.gathered is None:
                continue
            packed.restore(layer.base_layer if isinstance(layer, nn.Module) else layer.layer.get_base_layer())
            inputs, of = layer.norm_inputs(), kept.of
            same = of is not None and all(map(operator.is_, inputs, of))  # then they are in reach
            if layer.merged or (not same and norm_cache.out_of_reach(layer, inputs)):
                continue
            if not kept.gathered.taken:
                changed.append(layer)
            elif of is None:  # by norm_cache.suspend
                continue
            elif not same or kept.gathered.passed():
                changed.append(layer)
            elif kept.at is None or kept.at.in_other_grad_mode():
                doubted.append(layer)
        _take(changed, seen_by_autograd=True)
        _take(doubted, seen_by_autograd=False)


def _take(layers: list[Keeper], *, seen_by_autograd: bool) -> None:
    """Takes the norms of parameters that are whole now."""
    if not layers:
        return
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        norm_cache.take(layers, seen_by_autograd=seen_by_autograd, grad_mode=grad_mode)
    for layer in layers:
        if (kept := layer.kept) is not None:
            kept.gathered = Parts(kept.gathered.tensors, taken=True)
