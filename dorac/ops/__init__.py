"""Operators of the ``dorac`` library; importing this package registers them and touches neither Triton nor CUDA."""

from dorac.ops import compose, grouped, linear, norm, take

__all__ = ["compose", "grouped", "linear", "norm", "take"]
