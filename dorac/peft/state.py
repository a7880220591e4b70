"""What ``enable()`` has changed, for ``disable()`` to undo."""

import threading
import weakref
from collections.abc import Callable

from torch import nn


class State:
    """One for the process, as PEFT's classes are."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held by whoever writes to what follows, or to PEFT's classes
        # methods of PEFT's LoraModel, by name, while PEFT builds on dorac; None for one that it inherits
        self.stock: dict[str, Callable | None] = {}
        self.dropout_on = "adapter"  # of adapters that PEFT builds meanwhile
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were switched
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those of them that enable() was called with
        self.reported: set[str] = set()  # what a warning was given of


state = State()
