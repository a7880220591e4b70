"""Exceptions at every line in turn, and all that a model is made of, bit for bit."""

import itertools
import linecache
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

ERRORS = (ValueError, MemoryError, KeyboardInterrupt)


def raised_at_every_line(
    call: Callable[[], object], files: tuple[str, ...], *, start: int = 0, step: int = 1
) -> Iterator[int]:
    """Calls ``call`` with an exception raised before the n-th line that it runs in ``files``; yields n after each.

    Python traces the line of a ``with`` again when its block has ended well: nothing is raised there, after the block.

    Ends when ``call`` runs fewer lines than n; what it did then is done. ``call`` must find what it found before.
    """
    for n in itertools.count(start, step):
        error = ERRORS[n % len(ERRORS)](f"injected at line {n}")
        if not _raises(call, error, n, files):
            return
        yield n


def _raises(call: Callable[[], object], error: BaseException, n: int, files: tuple[str, ...]) -> bool:
    count = 0
    entered = set()

    def trace(frame, event, _):
        nonlocal count
        if not any(part in frame.f_code.co_filename for part in files):
            return None
        place = frame, frame.f_lineno
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            if place in entered:
                entered.remove(place)
                return trace
            entered.add(place)
        if event == "line":
            count += 1
            if count == n + 1:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except type(error) as caught:
        if caught is not error and caught.__context__ is not error:
            raise
        return True
    finally:
        sys.settrace(before)
    assert count <= n, f"what was raised at line {n} was lost"
    return False


def everything(model: nn.Module) -> dict[str, object]:
    """What a model is made of: classes, modules, attributes, hooks, flags, and every bit of its tensors."""
    return {
        name: (type(module), id(module), {key: _value(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _value(value: object) -> object:
    if isinstance(value, Tensor):
        bits = value.detach().flatten().view(torch.uint8).numpy().tobytes()
        return id(value), value.data_ptr(), value.requires_grad, value.dtype, value.shape, value.stride(), bits
    if isinstance(value, dict):
        return {key: _value(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, set, type(None))) else id(value)
