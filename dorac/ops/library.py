"""The ``dorac`` operator library and the one way a public op is registered."""

from collections.abc import Callable

import torch

lib = torch.library.Library("dorac", "DEF")


def register_composite(schema: str, body: Callable) -> None:
    """Defines a public op whose Python ``body`` is its implementation for autograd, every backend and vmap."""
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    lib.impl(name, body, "CompositeImplicitAutograd")
    lib.impl(name, body, "FuncTorchBatchedDecomposition")
