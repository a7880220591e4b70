"""dorac: DoRA (weight-decomposed low-rank adaptation) for PyTorch, functional and compile-first."""

from dorac import functional, ops

__version__ = "0.1.0"
__all__ = ["functional", "ops"]
