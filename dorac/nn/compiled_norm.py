"""``CompiledNorm``: what compiled code knows of a norm that is kept (:mod:`dorac.nn.norm_cache`).

Dynamo guards whatever a graph has read of Python's objects, in every call. What it reads of modules costs next to
nothing: one look at a module's dictionary tells that nothing in it has changed (torch 2.11), so long as all of it is
immutable, or modules again. A :class:`~dorac.nn.keeper.KeptNorm` is neither, and would have every guard of the layer
looked at. So compiled code never reads it. It reads a tuple in the dictionary of the layer, or of PEFT's magnitude:
there is one while compiled code may use the norm. It is replaced by another one only where that says another thing.

The norm is a parameter, so that no graph guards that it is none of its other inputs.
"""

import operator
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dorac.nn.keeper import Keeper

# Python 3.13 does not tell torch what is set in a module's dictionary: with torch 2.11 a graph goes on with what was
# there before, of plain modules too. There compiled code reads the KeptNorm, so that all guards are looked at.
DICTIONARIES_TELL = sys.version_info < (3, 13)


class CompiledNorm(NamedTuple):
    """A kept norm that compiled code may use, what it was taken of, with which scaling, and whether it is compared."""

    norm: Tensor
    of: tuple[Tensor, ...]
    scaling: float
    debug: bool


class Holder(Protocol):
    """The module that has it."""

    compiled_norm: CompiledNorm | None


def tell(keeper: "Keeper") -> None:
    """Tells compiled code what ``keeper.kept`` is now; whoever writes to that calls this.

    Looks again after it has written: another thread may have changed that, and told, in between.
    """
    while (holder := keeper.norm_holder()) is not None:
        now, told = _now(keeper), vars(holder).get("compiled_norm")
        if now is told or (now is not None and told is not None and _same(now, told)):
            return
        holder.compiled_norm = now
        if torch.compiler.is_compiling():
            return


def _now(keeper: "Keeper") -> CompiledNorm | None:
    kept = keeper.kept
    if kept is None or kept.of is None or kept.in_doubt or isinstance(kept.scaling, Tensor):  # which may change unseen
        return None
    return CompiledNorm(kept.norm, kept.of[:-1], kept.scaling, kept.debug)


def _same(one: CompiledNorm, other: CompiledNorm) -> bool:
    if one.norm is not other.norm or one.debug is not other.debug or len(one.of) != len(other.of):
        return False
    return one.scaling == other.scaling and all(map(operator.is_, one.of, other.of))
