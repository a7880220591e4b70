"""DoRA as pure functions of tensors (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353).

    V = W + s * lora_B @ lora_A          the adapted direction, section 4.1
    n = ||V||_row                        one L2 norm per output row, a constant in backprop (section 4.3) unless asked
    g = m / n                            1 where n <= 1e-12
    y = g * (x W^T + s (x lora_A^T) lora_B^T) + b

Neither V nor ``lora_B @ lora_A`` is ever materialised. Norm, g and the compose arithmetic are computed in float32
(float64 for float64 inputs), also under autocast, and the result is rounded once, to the activation's dtype. All
functions trace under ``torch.compile(fullgraph=True)`` and never change their inputs.

Legend: ``*`` any leading shape (also none), ``in``, ``out``, ``r`` the feature sizes and the rank. Derivations are in
``dorac/docs/derivations.md``, a table of the functions in ``dorac/docs/functions.md``.
"""

from dorac.functional.adapters import (
    Adapter,
    AdapterStack,
    at_strength,
    combine_adapters,
    combine_in_norm,
    scale_adapter,
    scale_in_norm,
    stack_adapters,
)
from dorac.functional.blocks import Projection, dora_linears, dora_mlp
from dorac.functional.columns import column_norm, dora_embedding_columns, dora_linear_columns, merge_columns
from dorac.functional.conv import conv_matrices, dora_conv1d, dora_conv2d, dora_conv3d, norm_factored_conv
from dorac.functional.embedding import dora_embedding
from dorac.functional.grouped import dora_linear_grouped
from dorac.functional.linear import compose, dora_linear, dora_over
from dorac.functional.merge import invertible_scale, merge_weight, unmerge_weight
from dorac.functional.mixed import dora_linear_mixed, mixed_norm
from dorac.functional.norm import init_magnitude, magnitude_scale, norm_factored
from dorac.ops.gate import Gate

__all__ = [
    "Adapter",
    "AdapterStack",
    "Gate",
    "Projection",
    "at_strength",
    "column_norm",
    "combine_adapters",
    "combine_in_norm",
    "compose",
    "conv_matrices",
    "dora_conv1d",
    "dora_conv2d",
    "dora_conv3d",
    "dora_embedding",
    "dora_embedding_columns",
    "dora_linear",
    "dora_linear_columns",
    "dora_linear_grouped",
    "dora_linear_mixed",
    "dora_linears",
    "dora_mlp",
    "dora_over",
    "init_magnitude",
    "invertible_scale",
    "magnitude_scale",
    "merge_columns",
    "merge_weight",
    "mixed_norm",
    "norm_factored",
    "norm_factored_conv",
    "scale_adapter",
    "scale_in_norm",
    "stack_adapters",
    "unmerge_weight",
]
