"""Validation of arguments by their metadata alone, so that it costs no synchronisation and runs while compiling too.

A ``TypeError`` names a wrong kind or dtype, a ``ValueError`` a wrong shape, device or value; each says what was
expected and what came. The checker itself is :func:`dorac.checks.shapes.fit`.
"""

from dorac.checks.conv import PADDING_MODES, check_conv, check_conv_factors, check_extent, check_geometry
from dorac.checks.embedding import check_embedding, check_embedding_columns, check_lookup
from dorac.checks.linear import (
    check_activation_dtype,
    check_adapter,
    check_compose,
    check_factors,
    check_grouped,
    check_linear,
    check_linear_columns,
    check_magnitude,
    check_mixed,
    check_over,
    check_packed_factors,
    check_projection,
    check_scaled_rows,
    check_stack,
    check_vector,
    check_weight_over,
)
from dorac.checks.numbers import (
    check_budget,
    check_dropout,
    check_dropout_on,
    check_norm_grad,
    check_scaling,
    check_scalings,
    python_number,
)
from dorac.checks.shapes import check_float

__all__ = [
    "PADDING_MODES",
    "check_activation_dtype",
    "check_adapter",
    "check_budget",
    "check_compose",
    "check_conv",
    "check_conv_factors",
    "check_dropout",
    "check_dropout_on",
    "check_embedding",
    "check_embedding_columns",
    "check_extent",
    "check_factors",
    "check_float",
    "check_geometry",
    "check_grouped",
    "check_linear",
    "check_linear_columns",
    "check_lookup",
    "check_magnitude",
    "check_mixed",
    "check_norm_grad",
    "check_over",
    "check_packed_factors",
    "check_projection",
    "check_scaled_rows",
    "check_scaling",
    "check_scalings",
    "check_stack",
    "check_vector",
    "check_weight_over",
    "python_number",
]
