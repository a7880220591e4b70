"""Operators of the ``dorac`` library; importing this package registers them and touches neither Triton nor CUDA."""

from dorac.ops import compose, embedding, flops, grouped, linear, norm, take

flops.register()

__all__ = ["compose", "embedding", "flops", "grouped", "linear", "norm", "take"]
