"""For tests: inputs off their initial state, and the law of error that every result is held to."""

from dorac.testing.inputs import (
    CONVOLUTIONS,
    REGIMES,
    Convolution,
    LinearInputs,
    conv_inputs,
    embedding_inputs,
    expert_inputs,
    linear_inputs,
)
from dorac.testing.rounding import (
    Budget,
    Sums,
    assert_rms_beside,
    layer_budgets,
    max_error,
    merge_budget,
    norm_budget,
    norm_gradient_budgets,
    rms_error,
    rounded,
    unit_roundoff,
)

__all__ = [
    "CONVOLUTIONS",
    "REGIMES",
    "Budget",
    "Convolution",
    "LinearInputs",
    "Sums",
    "assert_rms_beside",
    "conv_inputs",
    "embedding_inputs",
    "expert_inputs",
    "layer_budgets",
    "linear_inputs",
    "max_error",
    "merge_budget",
    "norm_budget",
    "norm_gradient_budgets",
    "rms_error",
    "rounded",
    "unit_roundoff",
]
