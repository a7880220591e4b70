"""Another card than the device's, given by hand."""

import contextlib
from collections.abc import Iterator

from dorac.kernels import target
from dorac.ops import eager, front


@contextlib.contextmanager
def launched_for(card: target.Target | None) -> Iterator[None]:
    """Kernels are launched as for ``card`` (:data:`dorac.kernels.target.CARDS`); None: aten computes everything.

    For all threads, and not for what ``torch.compile`` has compiled already. A card with more shared memory than the
    device has fails at the launch.
    """
    target._given.append(card)
    _forget()
    try:
        yield
    finally:
        target._given.pop()
        _forget()


def _forget() -> None:
    front._has_kernels.cache_clear()
    front._reads_packed.cache_clear()
    eager.forget_plans()
