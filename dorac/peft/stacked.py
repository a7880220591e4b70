"""The adapters of one layer in one stack, kept between forwards of ``adapter_names=[...]`` as their norms are.

Where :func:`dorac.cache_norms` keeps the norms of all adapters that a batch names and no gradient is recorded, the
stack of these adapters is kept as well, beside what was stacked before, so that batches of other adapters share it. It
follows the norms' rules: an adapter that the host sees written to, or whose norm was taken anew, is copied to its place
again. ``train()`` forgets the stack, so that training has no second copy of the factors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dorac import functional
from dorac.functional import Adapter, AdapterStack
from dorac.nn.norm_cache import Moment
from dorac.ops import front
from dorac.peft.norms import AdapterNorm


class Found(NamedTuple):
    """An adapter for this forward, its norm, and who keeps that, if anybody does."""

    adapter: Adapter
    norm: Tensor
    keeper: AdapterNorm | None = None

    def kind(self) -> tuple:
        """What the adapters of a stack have in common."""
        return self.adapter.lora_A.dtype, self.adapter.lora_B.dtype, self.norm.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.adapter[:3], self.norm


class Copied(NamedTuple):
    """What lies in a place of a stack: whose adapter, its rank, and the state in which it was copied."""

    keeper: AdapterNorm
    rank: int
    scaling: float
    moment: Moment
    norm_at: Moment | None  # another one once the norm, which is written where it lies, was taken anew

    def lasts(self, one: Found) -> bool:
        norm_lasts = self.norm_at is not None and self.norm_at is _norm_at(self.keeper)
        return norm_lasts and self.scaling == one.adapter.scaling and not self.moment.passed(one.tensors())


def _norm_at(keeper: AdapterNorm) -> Moment | None:
    kept = keeper.kept
    return None if kept is None else kept.at


def _copied(one: Found) -> Copied:
    rank, scaling = one.adapter.lora_A.shape[0], one.adapter.scaling
    return Copied(one.keeper, rank, scaling, Moment(one.tensors()), _norm_at(one.keeper))


class Kept:
    """A stack of the adapters that are given and of those of an earlier one that the layer still has."""

    def __init__(self, found: Mapping[str, Found], earlier: "Kept | None") -> None:
        self.kind = next(iter(found.values())).kind()
        self.copied = {name: _copied(one) for name, one in found.items()}
        if earlier is not None and earlier.kind == self.kind:
            others = {name: one for name, one in earlier.held().items() if name not in found}
            self.copied |= {name: earlier.copied[name] for name in others}
            found = {**found, **others}
        self.places = {name: place for place, name in enumerate(found)}
        self.stack, self.norms = _stacked(found)
        for copied in self.copied.values():
            copied.keeper.stack = self

    def held(self) -> dict[str, Found]:
        """The adapters that are still the layer's, as they were copied."""
        (lora_A, lora_B, magnitude, *_), held = self.stack, {}
        for name, one in self.copied.items():
            if one.keeper.stack is self and one.keeper.is_current():
                place, rank = self.places[name], one.rank
                adapter = Adapter(lora_A[place, :rank], lora_B[place, :, :rank], magnitude[place], one.scaling)
                held[name] = Found(adapter, self.norms[place], one.keeper)
        return held

    def see_to(self, name: str, one: Found) -> bool:
        """Copies an adapter that was written to, if it fits its place; whether it lies there now."""
        copied, place = self.copied[name], self.places[name]
        if copied.lasts(one):
            return True
        if (
            one.kind() != self.kind
            or one.adapter.lora_A.shape[0] != copied.rank
            or one.norm.device != self.norms.device
        ):
            return False
        lora_A, lora_B, magnitude, scaling = one.adapter
        self.stack.lora_A[place, : copied.rank] = lora_A
        self.stack.lora_B[place, :, : copied.rank] = lora_B
        self.stack.magnitude[place] = magnitude
        self.stack.scaling[place] = scaling
        self.norms[place] = one.norm
        self.copied[name] = _copied(one)
        return True


def _stacked(found: Mapping[str, Found]) -> tuple[AdapterStack, Tensor]:
    stack = functional.stack_adapters([one.adapter for one in found.values()])
    return stack, torch.stack([one.norm for one in found.values()])


def of(found: Mapping[str, Found]) -> tuple[AdapterStack, Tensor, dict[str, int]]:
    """A stack that holds these adapters, which are of one kind, their norms, and the place of each."""
    kept = None if torch.compiler.is_compiling() or front.under_transform() else _kept(found)
    if kept is not None:
        return kept.stack, kept.norms, kept.places
    return *_stacked(found), {name: place for place, name in enumerate(found)}


def _kept(found: Mapping[str, Found]) -> Kept | None:
    """The stack that is kept, with these adapters as they are now; None where none can be kept."""
    keepers = [one.keeper for one in found.values()]
    if not all(keepers):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for one in found.values() for t in one.tensors()):
        return None
    kept = next((keeper.stack for keeper in keepers if keeper.stack is not None), None)
    together = kept is not None and all(keeper.stack is kept for keeper in keepers)
    if front.capturing():  # what the graph allocates and writes is its own
        return kept if together and all(kept.copied[name].lasts(one) for name, one in found.items()) else None
    with torch.inference_mode(False), torch.no_grad():
        if together and all(kept.see_to(name, one) for name, one in found.items()):
            return kept
        return Kept(found, kept)
