"""dorac: DoRA (weight-decomposed low-rank adaptation) for PyTorch, functional and compile-first."""

from dorac import functional, nn, ops
from dorac.apply import apply_dora, merge, unmerge
from dorac.checkpoint import load_adapter, save_adapter

__version__ = "0.1.0"
__all__ = ["apply_dora", "functional", "load_adapter", "merge", "nn", "ops", "save_adapter", "unmerge"]
