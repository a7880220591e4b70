"""The norm of a packed weight in eager on a GPU with kernels: its launches, and no op of dorac's own.

As ``ops/eager.py`` computes the layer: what metadata settle is settled once, in a plan. Whatever else looks on, and
whatever no kernel reads, is left to ``ops/packed.py``, which has the formula.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dorac import checks, packed
from dorac.ops import eager, eager_plan, front
from dorac.ops.packed_product import Held, Reading


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How the norm is taken of weights of a form, and factors of certain metadata."""

    rank: int  # of the factors that the kernel reads
    arranges: bool  # lora_A's columns are put in the kernel's order first
    split: Callable | None  # of float32 factors, and what they are split into
    column_splits: int
    launch: Callable
    finish: Callable | None


def packed_norm(weight: packed.Packed | Held, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor | None:
    """The norm for a finite ``scaling``, or None if it is not taken here; errors are ``check_packed_factors``'s."""
    if not front.unobserved():
        return None
    try:
        held = weight if type(weight) is Held else Held(weight)
        reading = held.reading()
        if reading is None or not reading.aligned:
            return None
        key = (
            *("norm", reading.key),
            *(type(lora_A), lora_A.shape, lora_A.dtype, lora_A.device, lora_A.stride()),
            *(type(lora_B), lora_B.shape, lora_B.dtype, lora_B.device, lora_B.stride()),
        )
        plan = eager.plans.get(key, False)
        bits = lora_A.data_ptr() | lora_B.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # as in ops/eager.py
        return None
    if plan is False:
        checks.check_packed_factors(held.weight, lora_A, lora_B)
        plan = eager.keep_plan(key, make_plan(reading, held.shape, lora_A, lora_B))
    if plan is None or bits & 15:
        return None
    out_features, in_features = held.shape
    a, b = lora_A, lora_B
    if plan.split is not None:
        a = lora_A.new_empty(plan.rank, in_features, dtype=torch.bfloat16)
        b = lora_B.new_empty(out_features, plan.rank, dtype=torch.bfloat16)
        plan.split(lora_A, lora_B, a, b)
    elif plan.arranges:
        from dorac.kernels.packed_norm import arranged

        a = arranged(lora_A.detach())
    norm = lora_B.new_empty(out_features, dtype=torch.float32)
    parts = norm if plan.column_splits == 1 else norm.new_empty(plan.column_splits, 1, out_features)
    plan.launch(*reading.pieces, a, b, scaling, parts)
    if plan.finish is not None:
        plan.finish(parts, norm)
    return norm


def make_plan(reading: Reading, shape: tuple[int, int], lora_A: Tensor, lora_B: Tensor) -> Plan | None:
    """The plan for tensors that passed the checks; None if the norm is not taken here."""
    form, (out_features, in_features), rank = reading.form, shape, lora_A.shape[0]
    tensors = lora_A, lora_B, *(t for t in reading.pieces if t is not None)
    if not (out_features and in_features and front.all_eager(*tensors) and front.has_kernels(*tensors)):
        return None

    from dorac.kernels import target
    from dorac.kernels.configs import packed_norm_config
    from dorac.kernels.norm import split_launch
    from dorac.kernels.packed_norm import packed_norm_launches

    strides, arranges, split = [lora_A.stride(), lora_B.stride()], False, None
    if lora_A.dtype is torch.float32:
        whole = (0, *strides[0], 0, *strides[1])
        split = eager_plan.bound(split_launch(1, rank, in_features, out_features, whole, form.halves))
        rank *= 3
        strides = (in_features, 1), (rank, 1)
    elif form.halves == 2:
        arranges, strides[0] = True, (in_features, 1)
    config = packed_norm_config(1, out_features, in_features, form.halves, rank, target.of(lora_A))
    columns = in_features // form.halves
    column_splits, *launches = packed_norm_launches(
        1, out_features, columns, rank, (0, *strides[0], 0, *strides[1]), form, config
    )
    return Plan(rank, arranges, split, column_splits, *map(eager_plan.bound, launches))
