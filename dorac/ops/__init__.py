"""Operators of the ``dorac`` library; importing this package registers them and touches neither Triton nor CUDA."""

from dorac.ops import compose, embedding, grouped, linear, norm, take

__all__ = ["compose", "embedding", "grouped", "linear", "norm", "take"]
