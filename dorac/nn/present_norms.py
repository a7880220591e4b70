"""``present_norms``: the norms of layers as their tensors are now, taken together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dorac import checks
from dorac.nn.keeper import Keeper
from dorac.ops.norm import row_norms


def present_norms(layers: Sequence[Keeper]) -> list[Tensor]:
    """The present norms, those of layers of one layout in one launch; of a tensor-parallel layer this rank's rows."""
    scalings = [layer.scaling for layer in layers]
    spread = [getattr(layer, "shards", None) for layer in layers]
    operands = [
        None if isinstance(scaling, Tensor) else (shards.local_operands(layer) if shards else layer.norm_operands())
        for layer, scaling, shards in zip(layers, scalings, spread, strict=True)
    ]
    checked = set()
    for tensors, scaling in zip(operands, scalings, strict=True):
        if tensors is None:
            continue
        checks.check_scaling(scaling)
        if torch.compiler.is_compiling():
            checks.check_factors(*tensors)
            continue
        metadata = tuple([(type(t), t.shape, t.dtype, t.device) for t in tensors])  # all that the check looks at
        if metadata not in checked:
            checks.check_factors(*tensors)
            checked.add(metadata)
    together = row_norms(operands, scalings, [layer.norm_budget for layer in layers])
    norms = [
        norm if norm is not None else shards.local_norm(layer) if shards else layer._norm()
        for layer, norm, shards in zip(layers, together, spread, strict=True)
    ]
    if any(spread):
        from dorac.nn.tensor_parallel import total_norms  # which imports torch.distributed

        norms = total_norms(spread, norms)
    return norms
