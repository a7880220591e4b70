"""opcheck of every op on the dtypes, layouts and gradient patterns it is called with."""

import pytest
import torch
from test_routes import LAYER_LEAVES
from torch.library import opcheck

from dorac.ops.norm import DEFAULT_BUDGET
from dorac.testing import linear_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
full = pytest.mark.full
SAMPLED = [torch.bfloat16, *(pytest.param(dtype, marks=full) for dtype in DTYPES if dtype is not torch.bfloat16)]


def activation(shape, dtype, layout, requires_grad, device):
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if layout == "transposed":
        tensor = tensor.T.contiguous().T
        assert not tensor.is_contiguous()
    return tensor.requires_grad_(requires_grad)


def norm_args(regime, dtype, factor_dtype, layout, device):
    inputs = linear_inputs(
        regime, dtype=dtype, factor_dtype=factor_dtype, transposed=layout == "transposed", device=device
    )
    if layout == "transposed":
        assert not inputs.weight.is_contiguous()
    wide = torch.promote_types(torch.promote_types(dtype, inputs.lora_A.dtype), torch.float32)
    return inputs, torch.tensor(0.7, dtype=wide, device=device)


@pytest.mark.parametrize("op", ["norm_factored", "row_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("regime", ["odd", pytest.param("no_outputs", marks=full), pytest.param("rank_1", marks=full)])
@pytest.mark.parametrize("factor_dtype", [None, pytest.param(torch.float32, marks=full)])
@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=full)])
def test_norm(op, dtype, layout, regime, factor_dtype, cached, device):
    if layout == "transposed" and regime == "no_outputs":
        regime = "tall"  # an empty weight is contiguous in every order
    inputs, scaling = norm_args(regime, dtype, factor_dtype, layout, device)
    weight_sq = inputs.weight.double().square().sum(1).to(scaling.dtype) if cached else None
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, scaling, weight_sq, DEFAULT_BUDGET)
    opcheck(getattr(torch.ops.dorac, op).default, args)


def test_norm_with_trainable_factors(device):
    """The composite op accepts inputs that require a gradient and gives none back."""
    inputs, scaling = norm_args("odd", torch.float32, None, "contiguous", device)
    args = (
        inputs.weight,
        inputs.lora_A.requires_grad_(),
        inputs.lora_B.requires_grad_(),
        scaling,
        None,
        DEFAULT_BUDGET,
    )
    opcheck(torch.ops.dorac.norm_factored.default, args)
    assert not torch.ops.dorac.norm_factored(*args).requires_grad
    opcheck(torch.ops.dorac.norm_factored.default, (*args, True))
    assert torch.ops.dorac.norm_factored(*args, True).requires_grad


def with_experts(tensor):
    """Two experts at the strides of one."""
    return torch.stack([tensor.mT, 2 * tensor.mT]).mT if not tensor.is_contiguous() else torch.stack([tensor, -tensor])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("factor_dtype", [None, pytest.param(torch.float32, marks=full)])
def test_norm_backward_and_experts(dtype, layout, experts, factor_dtype, device):
    inputs, scaling = norm_args("odd", dtype, factor_dtype, layout, device)
    tensors = [inputs.weight, inputs.lora_A, inputs.lora_B]
    if experts:
        tensors = [with_experts(t) for t in tensors]
        assert tensors[0].is_contiguous() == (layout == "contiguous")
        opcheck(torch.ops.dorac.row_norm.default, (*tensors, scaling, None, DEFAULT_BUDGET))
    row_scale = torch.ones(tensors[0].shape[:-1], dtype=scaling.dtype, device=device)
    opcheck(torch.ops.dorac.row_norm_backward.default, (row_scale, *tensors, scaling, DEFAULT_BUDGET))
    leaves = [t.detach().requires_grad_(i > 0) for i, t in enumerate(tensors)]
    opcheck(torch.ops.dorac.norm_factored.default, (*leaves, scaling, None, DEFAULT_BUDGET, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("grads", ["none", "all", pytest.param("frozen_magnitude", marks=full)])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), pytest.param((0, 9), marks=full), pytest.param((6, 0), marks=full)])
@pytest.mark.parametrize("lora_dtype", [None, pytest.param(torch.float32, marks=full)])
def test_compose(dtype, layout, grads, delta, shape, lora_dtype, device):
    if 0 in shape:
        layout = "contiguous"
    wide = torch.promote_types(dtype, torch.float32)
    base = activation(shape, dtype, layout, grads != "none", device)
    lora = activation(shape, lora_dtype or dtype, layout, grads != "none", device)
    g = activation(shape[1:], wide, "contiguous", grads == "all", device)
    bias = None if delta else activation(shape[1:], dtype, "contiguous", grads == "all", device)
    opcheck(torch.ops.dorac.compose.default, (base, lora, g, torch.tensor(0.7, dtype=wide, device=device), bias, delta))


@pytest.mark.parametrize("dtype", SAMPLED)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("delta", [False, pytest.param(True, marks=full)])
def test_compose_of_channels(dtype, channels_last, grads, delta, device):
    wide = torch.promote_types(dtype, torch.float32)
    base, lora = (activation((2, 6, 3, 4), dtype, "contiguous", False, device) for _ in range(2))
    if channels_last:
        base, lora = (t.contiguous(memory_format=torch.channels_last) for t in (base, lora))
    base, lora = base.requires_grad_(grads), lora.requires_grad_(grads)
    g = activation((6,), wide, "contiguous", grads, device)
    bias = None if delta else activation((6,), dtype, "contiguous", grads, device)
    scaling = torch.tensor(0.7, dtype=wide, device=device)
    opcheck(torch.ops.dorac.compose.default, (base, lora, g, scaling, bias, delta, 1))


@pytest.mark.parametrize("op", ["compose_value", "compose_forward", "compose_backward"])
@pytest.mark.parametrize("dtype", SAMPLED)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_compose_leaves_of_channels(op, dtype, layout, device):
    wide = torch.promote_types(dtype, torch.float32)
    left, right = (activation((2, 6, 3, 4), dtype, "contiguous", False, device) for _ in range(2))
    if layout == "strided":
        left, right = (t.transpose(0, 3).contiguous().transpose(0, 3) for t in (left, right))
        assert not left.is_contiguous()
    g, scaling = activation((6,), wide, "contiguous", False, device), torch.tensor(0.7, dtype=wide, device=device)
    bias = activation((6,), dtype, "contiguous", False, device)
    rest = (wide, False) if op == "compose_backward" else (bias, False, dtype.itemsize >= 4)
    opcheck(getattr(torch.ops.dorac, op).default, (left, right, g, scaling, *rest))


@pytest.mark.parametrize("op", ["compose_value", "compose_forward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("delta", "holds_bias"), [(False, False), (True, False), (False, True)])
def test_compose_leaves(op, dtype, layout, delta, holds_bias, device):
    wide = torch.promote_types(dtype, torch.float32)
    base, lora = (activation((6, 9), dtype, layout, False, device) for _ in range(2))
    g, scaling = activation((9,), wide, "contiguous", False, device), torch.tensor(0.7, dtype=wide, device=device)
    bias = None if delta else activation((9,), dtype, "contiguous", False, device)
    opcheck(getattr(torch.ops.dorac, op).default, (base, lora, g, scaling, bias, delta, holds_bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("delta", [False, True])
def test_compose_backward(dtype, layout, delta, device):
    wide = torch.promote_types(dtype, torch.float32)
    dy, inner = activation((6, 9), dtype, layout, False, device), activation((6, 9), dtype, "contiguous", False, device)
    g, scaling = activation((9,), wide, "contiguous", False, device), torch.tensor(0.7, dtype=wide, device=device)
    opcheck(torch.ops.dorac.compose_backward.default, (dy, inner, g, scaling, wide, delta))


def test_every_op_is_checked():
    """Here, or with the routes, layers and lookups that an op is taken on: a new op needs its opcheck too."""
    registered = {name.removeprefix("dorac::") for name in torch._C._dispatch_get_all_op_names() if "dorac::" in name}
    norm = {"norm_factored", "row_norm", "row_norm_backward"}
    packed = {"packed_norm_factored", "packed_row_norm"}  # tests/test_packed.py
    compose = {"compose", "compose_value", "compose_forward", "compose_backward"}
    routes = {"dora_linear", *LAYER_LEAVES}  # tests/test_routes.py
    rows = {"take", "sum_by_index", "grouped_linear", "grouped_product", "grouped_outer"}  # tests/test_row_ops.py
    rows |= {f"grouped_compose{part}" for part in ("", "_value", "_forward", "_backward")}
    rows |= {f"mixed_{part}" for part in ("linear", "product", "outer", "value", "forward", "backward")}
    rows |= {"packed_grouped_linear", "packed_grouped_product"}  # tests/test_packed_experts.py
    sums = {"gradient_sums", "flat"}  # tests/test_gradient_sums.py
    elsewhere = {"sparse_columns", "dora_over"}  # tests/test_embedding.py, tests/test_over.py
    assert registered == norm | packed | compose | routes | rows | sums | elsewhere
