"""Where a warning points to: the line of the user's code that led to it."""

import sys
import warnings

# What may lie between that line and the one that warns: dorac, and what calls it for the user.
_BETWEEN = frozenset({"dorac", "torch", "peft", "transformers", "diffusers", "accelerate", "contextlib"})


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """``warnings.warn`` at the innermost line that is neither dorac's nor that of a library which calls it."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
