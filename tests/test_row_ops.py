"""The ops behind experts and mixed adapters: opcheck, and what they do to indices and offsets."""

import pytest
import row_layers
import torch
from torch.library import opcheck

from dorac import functional
from dorac.ops import by_expert
from dorac.ops.grouped import masked_outer, masked_product
from dorac.testing import expert_inputs, max_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.dorac
INDEX = torch.tensor([0, 0, 1, 3, 3])
OFFSETS = torch.tensor([2, 3, 3, 5], dtype=torch.int32)


def tensor(*shape, dtype=torch.float32, device="cpu", requires_grad=False, transposed=False):
    t = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    t = t.mT.contiguous().mT if transposed else t
    assert t.is_contiguous() != transposed
    return t.requires_grad_(requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grads", [(False, False), (True, False), (False, True), (True, True)])
def test_grouped_linear(dtype, transposed, grads, device):
    x = tensor(5, 6, dtype=dtype, device=device, requires_grad=grads[0])
    weight = tensor(4, 3, 6, dtype=dtype, device=device, requires_grad=grads[1], transposed=transposed)
    opcheck(ops.grouped_linear.default, (x, weight, OFFSETS.to(device)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_leaves(dtype, transposed, device):
    x, dy = tensor(5, 6, dtype=dtype, device=device), tensor(5, 3, dtype=dtype, device=device)
    weight = tensor(4, 3, 6, dtype=dtype, device=device, transposed=transposed)
    opcheck(ops.grouped_product.default, (x, weight, OFFSETS.to(device)))
    opcheck(ops.grouped_outer.default, (dy, x, OFFSETS.to(device)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_grouped_compose(dtype, factor_dtype, each, delta, device):
    """Rows 5 and 6 are no expert's."""
    factor_dtype = factor_dtype if dtype.itemsize == 2 and factor_dtype else dtype
    wide = torch.promote_types(dtype, torch.float32)
    base, h = tensor(7, 3, dtype=dtype, device=device), tensor(7, 2, dtype=factor_dtype, device=device)
    lora_B = tensor(4, 3, 2, dtype=factor_dtype, device=device, transposed=each)
    magnitude, norm = (tensor(4, 3, dtype=wide, device=device).abs() + 0.5 for _ in range(2))
    scaling = torch.rand((4,) if each else (), device=device, dtype=wide)
    layer, offsets = (lora_B, magnitude, norm, scaling), OFFSETS.to(device)
    bias = None if delta else tensor(4, 3, dtype=dtype, device=device)
    for op in (ops.grouped_compose_value, ops.grouped_compose_forward):
        opcheck(op.default, (base, h, *layer, bias, offsets, delta))
    opcheck(ops.grouped_compose_backward.default, (base, base.sin(), h, *layer, offsets, delta))
    for t in (base, h, lora_B, magnitude):
        t.requires_grad_()
    opcheck(ops.grouped_compose.default, (base, h, *layer, bias, offsets, delta))
    opcheck(ops.grouped_compose.default, (base, h, lora_B, magnitude.detach(), *layer[2:], bias, offsets, delta))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_without_reading_the_offsets(dtype, device):
    """What runs while a CUDA graph is captured: no expert sees rows of others, nor those past the last offset."""
    x, dy = tensor(7, 6, dtype=dtype, device=device), tensor(7, 3, dtype=dtype, device=device)
    x[6] = dy[6] = float("inf")
    x[2] = float("nan")  # of expert 1
    weight, offsets = tensor(4, 3, 6, dtype=dtype, device=device), OFFSETS.to(device)
    for masked, leaf, args in (
        (masked_product, ops.grouped_product, (x, weight, offsets)),
        (masked_outer, ops.grouped_outer, (dy, x, offsets)),
    ):
        expected = leaf(*args)
        assert expected[3].isfinite().all()
        torch.testing.assert_close(masked(*args), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_take(dtype, shape, device):
    stack = tensor(*shape, dtype=dtype, device=device, requires_grad=True)
    opcheck(ops.take.default, (stack, INDEX.to(device)))
    opcheck(ops.sum_by_index.default, (stack.detach()[INDEX.to(device)], INDEX.to(device), 4))


def test_sum_by_index_sums_in_float32(device):
    """300 ones in bfloat16 would stop growing at 256."""
    entries, index = torch.ones(300, 2, dtype=torch.bfloat16, device=device), torch.zeros(300, device=device).long()
    assert (ops.sum_by_index(entries, index, 1) == 300).all()


OF_ROW = torch.tensor([1, -1, 3, 1, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_mixed_leaves(dtype, transposed, device):
    x, dy = tensor(5, 2, 6, dtype=dtype, device=device), tensor(5, 2, 3, dtype=dtype, device=device)
    stack, index = tensor(4, 3, 6, dtype=dtype, device=device, transposed=transposed), OF_ROW.to(device)
    opcheck(ops.mixed_product.default, (x, stack, index))
    opcheck(ops.mixed_outer.default, (dy, x, index, 4))


@pytest.mark.parametrize(("dtype", "leading"), list(zip(DTYPES, [(), (2,), (2, 3), (1,)], strict=True)))
def test_mixed_layer(dtype, leading, device):
    """The op and its leaves."""
    bias = len(leading) == 1
    x, weight = tensor(5, *leading, 6, dtype=dtype, device=device), tensor(3, 6, dtype=dtype, device=device)
    lora_A, lora_B = tensor(4, 2, 6, dtype=dtype, device=device), tensor(4, 3, 2, dtype=dtype, device=device)
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    magnitude, norm, scaling = (torch.rand(s, dtype=acc, device=device) + 0.5 for s in ((4, 3), (4, 3), (4,)))
    tensors = x, weight, lora_A, lora_B, magnitude, norm, scaling
    others = tensor(3, dtype=dtype, device=device) if bias else None, OF_ROW.to(device), None
    opcheck(ops.mixed_value.default, (*tensors, *others, False))
    opcheck(ops.mixed_forward.default, (*tensors, *others))
    y, h, inner = ops.mixed_forward(*tensors, *others)
    for needs_x in (False, True):
        opcheck(ops.mixed_backward.default, (torch.randn_like(y), *tensors, h, inner, others[1], needs_x))
    trained = [t.requires_grad_(t is not weight and t is not norm and t is not scaling) for t in tensors]
    opcheck(ops.mixed_linear.default, (*trained, *others))


def test_gradients_repeat_bitwise(device):
    """Many rows of one expert and one adapter: their sum has one order."""
    inputs = expert_inputs(2, (600, 16, 24, 4), dtype=torch.float32, device=device)
    x, weight, *adapter, bias = inputs.leaves().tensors()
    offsets = torch.tensor([1000, 1200], dtype=torch.int32, device=device)
    index = torch.zeros(1200, dtype=torch.int64, device=device)
    for run in (
        lambda: functional.dora_linear_grouped(x.flatten(0, 1), weight, *adapter, bias, offsets=offsets, scaling=0.7),
        lambda: functional.dora_linear_mixed(
            x.flatten(0, 1), weight[0], *adapter, bias[0], adapter_index=index, scaling=0.7
        ),
    ):
        first, second = (torch.autograd.grad(run().sin().sum(), adapter) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_past_the_last_offset_get_zeros_and_no_gradient(dropout_p, device):
    inputs = expert_inputs(4, (2, 5, 6, 3), device=device)
    x, *rest = inputs.leaves().tensors()
    x = x.detach().flatten(0, 1).requires_grad_()
    offsets = OFFSETS.to(device)

    def run(rows):
        torch.manual_seed(2)
        y = functional.dora_linear_grouped(x[:rows], *rest, offsets=offsets, scaling=0.7, dropout_p=dropout_p)
        return y, torch.autograd.grad(y.sin().sum(), (x, *rest))

    y, grads = run(8)
    assert (y[5:] == 0).all()
    assert (grads[0][5:] == 0).all()
    if not dropout_p:  # of which another number of rows draws another mask
        torch.testing.assert_close((y[:5], grads), run(5))
    exact = torch.func.vmap(lambda x: functional.dora_linear_grouped(x, *rest, offsets=offsets, scaling=0.7))
    torch.testing.assert_close(
        exact(x[None, :8])[0], functional.dora_linear_grouped(x[:8], *rest, offsets=offsets, scaling=0.7)
    )


@pytest.mark.parametrize("ends", [[3, 2, 5, 5], [2, 3, 3, 6]])
def test_offsets_that_decrease_or_run_over_are_refused(ends):
    inputs = expert_inputs(4, (2, 5, 6, 3))
    with pytest.raises(ValueError, match="offsets must not decrease nor exceed the 5 rows of x"):
        functional.dora_linear_grouped(
            inputs.x.flatten(0, 1)[:5], *inputs.tensors()[1:], offsets=torch.tensor(ends), scaling=0.7
        )


def test_no_expert_is_computed_for_rows_of_another():
    """An expert whose weight and adapter are NaN stays with its rows, in both directions."""
    inputs = expert_inputs(4, (2, 5, 6, 3))
    for t in inputs.tensors()[1:]:
        t[2] = float("nan")
    leaves = inputs.leaves().tensors()
    y = functional.dora_linear_grouped(leaves[0].flatten(0, 1)[:5], *leaves[1:], offsets=OFFSETS, scaling=0.7)
    assert y.isfinite().all()
    y.sum().backward()
    assert leaves[0].grad.isfinite().all()
    assert all(t.grad[[0, 1, 3]].isfinite().all() for t in leaves[1:])


def test_plain_rows_see_no_adapter():
    """Rows with -1 are the base layer's, and finite, next to an adapter that is not."""
    inputs = expert_inputs(2, (3, 5, 6, 3))
    weight, bias = inputs.weight[0], inputs.bias[0]
    adapter = [t.index_fill(0, torch.tensor(0), float("nan")).requires_grad_() for t in inputs.tensors()[2:5]]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = functional.dora_linear_mixed(x, weight, *adapter, bias, adapter_index=torch.tensor([-1, 1, -1, 1]), scaling=0.7)
    expected = torch.nn.functional.linear(x, weight, bias)
    # x W^T and the sum with the bias are each rounded once here; F.linear may fuse the two.
    assert max_error(y[::2], expected[::2]) <= 2 * torch.finfo(torch.float64).eps * expected.abs().max()
    y.sum().backward()
    assert x.grad.isfinite().all()
    for t in adapter:
        assert (t.grad[0] == 0).all()
        assert t.grad[1].isfinite().all()
        assert t.grad[1].abs().sum() > 0


@pytest.mark.parametrize("index", [3, -2, 17])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_an_adapter_out_of_range_is_named(index, backend):
    inputs = expert_inputs(3, (2, 5, 6, 3))
    run = functional.dora_linear_mixed
    run = torch.compile(run, fullgraph=True, backend=backend) if backend else run
    with pytest.raises(IndexError, match=f"adapter_index holds {index}, out of bounds for dimension 0 with size 3"):
        run(inputs.x[0], inputs.weight[0], *inputs.tensors()[2:5], adapter_index=torch.tensor([0, index]), scaling=0.7)


@pytest.mark.parametrize("place", ["aligned", "off by one", "expanded"])
@pytest.mark.parametrize(("ends", "tail"), [([3, 3, 5, 21], 2), ([0, 0], 3), ([7], 0)])
@pytest.mark.parametrize("each", [False, True])
def test_experts_by_torchs_grouped_gemm(place, ends, tail, each, monkeypatch):
    """On the CPU, where rows are multiples of 16 bytes; rows of a tail may hold anything."""
    taken, products = [], by_expert._products
    monkeypatch.setattr(
        by_expert, "_products", lambda offsets, by_torch: taken.append(by_torch) or products(offsets, by_torch)
    )
    layer = row_layers.grouped(torch.tensor(ends), tail)
    x, *stacks = (t.float() for t in layer.inputs(24, 16, 8).tensors())
    if place == "off by one":
        x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    if place == "expanded":
        x = x[:1].expand(x.shape)
    tensors = [x.requires_grad_(), stacks[0], *(t.requires_grad_() for t in stacks[1:])]
    scaling = torch.linspace(0.5, 1.5, len(ends)) if each else 0.7
    norm = row_layers.row_norm(*(t.detach() for t in tensors[1:4]), scaling)
    y = layer.function(*tensors, scaling=scaling, weight_norm=norm)
    dy = torch.randn_like(y)
    given = dy.index_fill(0, torch.arange(ends[-1], len(y)), torch.nan)
    trained = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(y, trained, given)
    assert taken == [place == "aligned"] * 2
    budgets = row_layers.budgets(layer, tensors, dy=dy, scaling=scaling, weight_norm=norm)
    budgets.pop("weight", None)
    for (name, budget), found in zip(budgets.items(), (y, *grads), strict=True):
        budget.check(found, name)
    assert not y[ends[-1] :].any()
    assert not grads[0][ends[-1] :].any()
