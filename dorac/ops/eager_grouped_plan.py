"""``Plan``: how rows by expert are computed in eager, by the metadata of their tensors.

``ops/eager_grouped.py`` runs it. A plan holds no tensors.

Legend: as there.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dorac.ops import by_expert, eager_plan, front
from dorac.ops.gate import Gate


@dataclasses.dataclass(frozen=True, slots=True)
class Slices:
    """Layers on the CPU."""

    even: bool = False  # see by_expert.py
    gate: None = None  # which is aten's, behind them
    in_ops: bool = False  # which modes see


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed on a GPU."""

    down: tuple  # of h: splits, launch, what adds them up
    compose: Callable  # of h, base, lora_B, magnitude, norm, scaling, bias, offsets, order, y and inner
    backward: Callable[[tuple[int, int], bool], tuple]  # of dy's strides, with a bias's gradient or not: the same
    of_h: Callable[[tuple[int, int]], tuple]  # of the strides of dy, or of g * dy: the same of d_h
    of_a: tuple  # the same of lora_A's gradient
    of_x: Callable  # of compose's arguments: d_h A accumulated onto the gradient of x
    wide: bool  # float32 factors
    gate: Gate | None = None  # behind the layer: "compose" and "backward" take it along, each with arguments of its own
    in_ops: bool = False  # which modes see


def make_plan(
    x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets, scaling, training, gate
) -> Plan | Slices | None:
    """The plan for tensors that passed the checks; None if they are not computed here."""
    given = [t for t in (x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets) if t is not None]
    if not all(t.numel() for t in given) or not front.all_eager(*given) or front.autocast_dtype(x) is not None:
        return None
    if by_expert.takes(x, weight, lora_A, lora_B, magnitude, bias, weight_norm):
        return Slices(by_expert.even(x, weight, lora_A, lora_B))
    if not front.has_kernels(*given[:-1]):
        return None
    if weight.dtype is not torch.bfloat16 or lora_A.dtype not in (torch.bfloat16, torch.float32):
        return None
    experts, out_features, in_features = weight.shape
    rows, rank = x.shape[0], lora_A.shape[1]
    if out_features % 8 or in_features % 8 or not x.is_contiguous():
        return None
    if sorted(weight.stride()[1:])[0] != 1 or any(stride % 8 for stride in weight.stride() if stride != 1):
        return None
    if not all(t.is_contiguous() for t in (magnitude, bias, offsets, scaling) if isinstance(t, Tensor)):
        return None
    if weight_norm.stride(1) != 1:
        return None

    from dorac.kernels import configs, segments, target

    half, factor, card = weight.dtype, lora_A.dtype, target.of(x)
    wide, each = factor is torch.float32, isinstance(scaling, Tensor) and scaling.ndim == 1
    of_y, of_x, h = (out_features, 1), (in_features, 1), (rank, 1)
    sizes, stride_norm = (rows, experts), weight_norm.stride(0)

    def product(length, strides, **flags):
        config = configs.segment_product_config(*sizes, length, rank, half, factor, card)
        splits, *launches = segments.segment_product_launches(*sizes, length, rank, strides, config, wide=wide, **flags)
        return splits, *map(eager_plan.bound, launches)

    def compose(length, strides, each):
        config = configs.segment_tile_config(*sizes, length, rank, factor, half, card)
        flags = {"delta": False, "split": wide, "each": each, "stride_norm": stride_norm}
        return eager_plan.bound(segments.segment_compose_launch(*sizes, length, rank, strides, config, **flags))

    def backward(length, strides, *, magnitudes):
        config = configs.segment_backward_config(rows, length, rank, half, factor, card)
        flags = {
            "magnitudes": magnitudes,
            "delta": False,
            "wide": wide,
            "each": each and magnitudes,
            "stride_norm": stride_norm,
        }
        strips, *launches = segments.segment_backward_launches(*sizes, length, rank, strides, config, **flags)
        return strips, *map(eager_plan.bound, launches)

    def transposed(strides):
        return tuple(strides[i] for i in (0, 2, 1))

    d_a, d_b = (torch.empty_like(t, device="meta").stride() for t in (lora_A, lora_B))
    of_b = lora_B.stride()

    @functools.lru_cache(maxsize=16)
    def of_h(strides):
        return product(out_features, (strides, transposed(of_b)), each=each, stride_norm=stride_norm)

    if gate is None:
        forward = compose(out_features, (of_y, h, of_b), each)

        @functools.lru_cache(maxsize=16)
        def of_dy(strides, of_bias):  # which is another kernel's
            return backward(out_features, (strides, of_y, h, d_b), magnitudes=True)

    else:
        features = out_features // 2
        of_gate = dataclasses.astuple(gate)
        flags = {"each": each, "stride_norm": stride_norm}
        config = configs.segment_gate_config(*sizes, features, rank, factor, card)
        launch = segments.segment_gate_launch(*sizes, features, rank, of_b, of_gate, config, split=wide, **flags)
        forward = eager_plan.bound(launch)
        back_config = configs.segment_gate_backward_config(rows, features, rank, factor, card)

        @functools.lru_cache(maxsize=16)
        def of_dy(strides, of_bias):  # of z's gradient
            strips, *launches = segments.segment_gate_backward_launches(
                *sizes, features, rank, (strides, d_b), of_gate, back_config, wide=wide, **flags
            )
            return strips, *map(eager_plan.bound, launches)

    return Plan(
        down=product(in_features, (of_x, lora_A.stride()), each=False),
        compose=forward,
        backward=of_dy,
        of_h=of_h,
        of_a=backward(in_features, (of_x, (0, 0), h, transposed(d_a)), magnitudes=False),
        of_x=compose(in_features, (of_x, h, transposed(lora_A.stride())), False),
        wide=wide,
        gate=gate,
    )
