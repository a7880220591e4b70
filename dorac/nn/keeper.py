"""``Keeper``: whose norm is kept, and ``KeptNorm``: what it has of it."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from dorac.undo import State

if TYPE_CHECKING:
    from dorac.nn.compiled_norm import Holder
    from dorac.nn.gathered import Parts
    from dorac.nn.moments import Moment


@dataclasses.dataclass(eq=False)
class KeptNorm(State):
    """A norm between the steps that change it, and of what it is: all that :mod:`dorac.nn.norm_cache` writes.

    Attributes:
        debug: whether every forward takes the norm, too, and compares.
        norm: the norm; None: not taken yet.
        of: the tensors it was taken of, and itself; None: forward takes its own.
        scaling: the one that it was taken with.
        at: the state of ``of``; None: an eager forward takes the norm anew.
        source: the state of what lasts of ``of`` where some of it is offloaded, see :mod:`dorac.nn.offloaded`.
        gathered: of what FSDP2 makes whole, see :mod:`dorac.nn.gathered`; None: it doesn't.
        in_doubt: whether compiled code takes its own.
        distrusted: whether it is in doubt after every step, not only until the next one.
        traced: whether there is compiled code that uses it.
        shelved: what of this adapters that are not active have, by name, see :func:`dorac.nn.shelf.shelve_norm`.
    """

    debug: bool
    norm: Tensor | None = None
    of: tuple[Tensor | None, ...] | None = None
    scaling: float | None = None
    at: "Moment | None" = None
    source: "Moment | None" = None
    gathered: "Parts | None" = None
    in_doubt: bool = False
    distrusted: bool = False
    traced: bool = False
    shelved: dict[str, dict] | None = None


class Keeper(Protocol):
    """Whose norm is kept: a :class:`dorac.nn.DoraLayer`, or one adapter of a layer of PEFT's.

    Copies and pickles of a layer keep none. They take their own norm, since no optimizer of theirs is known.
    """

    kept: KeptNorm | None
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

    def norm_holder(self) -> "Holder | None":
        """The module where compiled code looks for the norm; None once it is gone."""

    def packed_base(self) -> nn.Module | None:
        """The module of which :func:`dorac.packed.stored` has the pieces of the base weight; None for a dense one."""

    def _norm(self) -> Tensor: ...
