"""``Keeper``: whose norm is kept, and what it has of it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Keeper(Protocol):
    """Whose norm is kept: a :class:`dorac.nn.DoraLayer`, or one adapter of a layer of PEFT's.

    It has the attributes of :data:`NOTHING_KEPT`, and they are all that :mod:`dorac.nn.norm_cache` writes.
    """

    norm_grad: bool
    norm_budget: int
    scaling: float | Tensor  # and _scaling, the same
    merged: bool  # or in another state in which no norm can be taken
    cannot_cache: str | None  # why no norm can be kept, beside what is asked of all

    def base_weights(self) -> Sequence[Tensor]: ...

    def norm_inputs(self) -> tuple[Tensor, ...]:
        """The base weights and, of each, its two factors."""

    def norm_operands(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The matrix and the factors, None where the norm is not that of one dense matrix."""

    def packed_base(self) -> nn.Module | None:
        """The module of which :func:`dorac.packed.stored` has the pieces of the base weight; None for a dense one."""

    def _norm(self) -> Tensor: ...


# What copies and pickles of a layer hold. They take their own norm, since no optimizer of theirs is known.
NOTHING_KEPT = {
    "caches_norm": False,  # whether the norm is cached
    "cached_norm": None,
    "cached_of": None,  # the tensors it was taken of, and itself; None: forward takes its own
    "cached_scaling": None,  # the scaling that it was taken with
    "cached_source": None,  # the Moment of what lasts of them where some are offloaded, see offloaded.py
    "gathered": None,  # the gathered.Parts of what FSDP2 makes whole, see gathered.py; None: it doesn't
    "cached_at": None,  # their Moment; None: an eager forward takes the norm anew
    "norm_in_doubt": False,  # whether compiled code takes its own
    "norm_distrusted": False,  # whether it is in doubt after every step, not only until the next one
    "norm_traced": False,  # whether there is compiled code that uses it
    "check_cached_norm": False,  # whether forward compares it
    "shelved_norms": None,  # what of this adapters that are not active have, by name: see norm_cache.shelve()
}
