"""How many floating-point operations each leaf op takes, for ``torch.utils.flop_counter`` and readers of its registry.

``FlopCounterMode`` sees of a leaf op no more than its name; compiled code is planned by the same registry
(``activation_memory_budget``). As torch's own formulas these count products alone, two operations for each
multiplication and addition, and what the aten body of the op does; the Triton kernels do no more. Elementwise ops count
zero. Grouped products count every row, wherever the offsets end: no formula sees their values.

Importing torch's module takes half a second, and imports Triton. So its registry is filled when somebody imports it.
"""

import math

import torch

from dorac.ops.on_import import on_import

MODULE = "torch.utils.flop_counter"


def _product(left, right):
    """``left @ right`` of shapes ``[*, m, k]`` and ``[*, k, n]``."""
    return 2 * math.prod(left) * right[-1]


def _row_norm(weight, lora_A, lora_B, scaling, weight_sq, budget, **_):
    *experts, _, in_features = weight
    rank = lora_A[-2]
    if weight_sq is None:
        return _product(lora_B, lora_A)
    gram = (*experts, rank, rank)
    return _product(weight, (in_features, rank)) + _product(lora_A, (in_features, rank)) + _product(lora_B, gram)


def _packed_row_norm(lora_A, lora_B, scaling, weight_sq, kind, pieces, shape, dtype, sizes, budget, **_):
    return _row_norm(shape, lora_A, lora_B, scaling, weight_sq, budget)


def _row_norm_backward(row_scale, weight, lora_A, lora_B, scaling, budget, **_):
    rank, in_features = lora_A[-2:]
    wide = _product(weight, (in_features, rank)) + _product((*lora_A[:-2], rank, weight[-2]), weight)
    square = _product((*lora_A[:-2], rank, weight[-2]), lora_B) + _product(lora_B, (rank, rank))
    return wide + square + 2 * _product(lora_A, (in_features, rank))


def _low_rank_linear(x, weight, h, lora_B, **_):
    return _product(x, (x[1], weight[0])) + _product(h, (h[1], lora_B[0]))


def _delta_linear(x, x_adapter, weight, h, lora_B, *_, **__):
    return 2 * _product(x, (x[1], weight[0])) + _product(h, (h[1], lora_B[0]))


def _up_compose(base, h, lora_B, *_, **__):
    return _product(h, (h[1], lora_B[0]))


def _lora_b_backward(dy, inner, magnitude, weight_norm, h, *_, **__):
    return _product((dy[1], dy[0]), h)


def _grouped_product(x, weight, offsets, **_):
    return _product(x, (x[1], weight[1]))


def _packed_grouped_product(x, offsets, kind, pieces, shape, dtype, sizes, budget, transposed, **_):
    return _product(x, shape[-2:] if transposed else (shape[-1], shape[-2]))


def _grouped_outer(left, right, offsets, **_):
    return _product((left[1], left[0]), right)


def _mixed_product(x, stack, index, **_):
    return _product(x, (x[2], stack[1]))


def _mixed_outer(left, right, index, length, **_):
    return _product((left[2], left[0] * left[1]), (right[1], right[2]))


def _mixed_value(x, weight, lora_A, lora_B, *_, **__):
    rank, tokens = lora_A[1], x[:-1]
    low_rank = _product(x, (x[-1], rank)) + _product((*tokens, rank), (rank, weight[0]))
    return _product(x, (x[-1], weight[0])) + low_rank


def _mixed_backward(dy, x, weight, lora_A, lora_B, m, n, s, h, inner, index, needs_x, **_):
    rank, tokens = lora_A[1], x[:-1]
    down, up = _product((*tokens, x[-1]), (x[-1], rank)), _product((*tokens, rank), (rank, weight[0]))
    of_x = _product((*tokens, weight[0]), weight) + down if needs_x else 0
    return of_x + down + 2 * up


def _grouped_compose(base, h, *_, **__):
    return _product(h, (h[1], base[1]))


def _grouped_compose_backward(dy, inner, h, *_, **__):
    return 2 * _product(h, (h[1], dy[1]))


def _elementwise(*_, **__):
    return 0


FORMULAS = {
    "row_norm": _row_norm,
    "packed_row_norm": _packed_row_norm,
    "row_norm_backward": _row_norm_backward,
    "low_rank_linear": _low_rank_linear,
    "delta_linear": _delta_linear,
    "up_compose": _up_compose,
    "up_compose_forward": _up_compose,
    "lora_b_backward": _lora_b_backward,
    "grouped_product": _grouped_product,
    "grouped_outer": _grouped_outer,
    "packed_grouped_product": _packed_grouped_product,
    "mixed_product": _mixed_product,
    "mixed_outer": _mixed_outer,
    "mixed_value": _mixed_value,
    "mixed_forward": _mixed_value,
    "mixed_backward": _mixed_backward,
    "grouped_compose_value": _grouped_compose,
    "grouped_compose_forward": _grouped_compose,
    "grouped_compose_backward": _grouped_compose_backward,
    **dict.fromkeys(
        (
            "compose_value",
            "compose_forward",
            "compose_backward",
            "scale",
            "scale_backward",
            "sum_by_index",
            "mag_scale",
            "cast",
            "flat",
            "gradient_sums",
        ),
        _elementwise,
    ),
}


def _register(flop_counter) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.dorac, name)
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


def register() -> None:
    """Registers the formulas, now and whenever ``torch.utils.flop_counter`` is imported."""
    on_import(MODULE, _register)
