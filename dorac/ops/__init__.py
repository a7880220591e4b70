"""Operators of the ``dorac`` library; importing this package registers them and touches neither Triton nor CUDA."""

from dorac.ops import compose, norm

__all__ = ["compose", "norm"]
