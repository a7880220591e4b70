"""Operators of the ``dorac`` library; importing this package registers them and touches neither Triton nor CUDA."""

from dorac.ops import (
    compose,
    embedding,
    flops,
    gradient_sums,
    grouped,
    grouped_compose,
    inductor,
    library,
    linear,
    mixed,
    norm,
    over,
    packed,
    packed_grouped,
    recompute,
    take,
)

flops.register()
gradient_sums.register()
inductor.register()
library.key_caches()
recompute.register()

__all__ = [
    "compose",
    "embedding",
    "flops",
    "gradient_sums",
    "grouped",
    "grouped_compose",
    "inductor",
    "library",
    "linear",
    "mixed",
    "norm",
    "over",
    "packed",
    "packed_grouped",
    "recompute",
    "take",
]
