"""Rows of different adapters by the kernels: on the GPU as they are, on the CPU through Triton's interpreter."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional
from dorac.ops import eager, eager_mixed, front
from dorac.ops import mixed as ops_mixed
from dorac.testing import rms_error

pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder

from dorac.kernels import configs, row_configs
from dorac.kernels.launch import ASSERTS
from dorac.kernels.mixed import mixed
from dorac.kernels.mixed_tiles import list_tiles, most_tiles
from dorac.kernels.stack_norm import stack_norm
from dorac.kernels.target import CARDS

HALF = torch.bfloat16, torch.float16
PAIRS = [(torch.float32,) * 2, *((dtype,) * 2 for dtype in HALF), *((dtype, torch.float32) for dtype in HALF)]
# Relative to the largest output. The interpreter truncates to bfloat16 where the GPU rounds.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Layer:
    """Random tensors of one layer with its adapters: K, out, in, rank."""

    def __init__(self, index, tokens, sizes, dtype, factor_dtype, device, ranks=False, bias=True):
        adapters, out_features, in_features, rank = sizes
        of = {"dtype": torch.float64, "device": device}
        self.x = torch.randn(len(index), *tokens, in_features, **of).to(dtype)
        self.weight = (torch.randn(out_features, in_features, **of) * max(in_features, 1) ** -0.5).to(dtype)
        self.lora_A = (torch.randn(adapters, rank, in_features, **of) * max(in_features, 1) ** -0.5).to(factor_dtype)
        self.lora_B = torch.randn(adapters, out_features, rank, **of).to(factor_dtype)
        self.magnitude, self.norm = (0.5 + torch.rand(2, adapters, out_features, **of)).float()
        self.scaling = (0.5 + torch.rand(adapters, **of)).float()
        self.bias = torch.randn(out_features, **of).to(dtype) if bias else None
        self.ranks, self.index = None, torch.tensor(index, dtype=torch.int64, device=device)
        if ranks:
            self.ranks = torch.arange(adapters, device=device) * 7 % rank + 1
            kept = torch.arange(rank, device=device) < self.ranks[:, None]
            self.lora_A *= kept[:, :, None]
            self.lora_B *= kept[:, None]

    def function(self, **options):
        tensors = self.x, self.weight, self.lora_A, self.lora_B, self.magnitude, self.bias
        given = {"adapter_index": self.index, "scaling": self.scaling, "weight_norm": self.norm, "ranks": self.ranks}
        return functional.dora_linear_mixed(*tensors, **given | options)

    def truth(self):
        """``(y, h, inner)`` in float64, row by row."""
        rows, bias = [], 0 if self.bias is None else self.bias.double()
        for x, k in zip(self.x.double(), self.index.tolist(), strict=True):
            base = x @ self.weight.double().T
            h = torch.zeros(*x.shape[:-1], self.lora_A.shape[1], dtype=torch.float64, device=x.device)
            if k >= 0:
                h = x @ self.lora_A[k].double().T
                inner = base + self.scaling[k].double() * h @ self.lora_B[k].double().T
                rows.append((inner * (self.magnitude[k] / self.norm[k]).double() + bias, h, inner))
            else:
                rows.append((base + bias, h, base))
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def kernel(self, config=None, want_inner=True):
        rows = self.x.reshape(math.prod(self.x.shape[:-1]), self.x.shape[-1])
        stacks = self.lora_A, self.lora_B, self.magnitude, self.norm, self.scaling, self.bias, self.index, self.ranks
        return mixed(F.linear(rows, self.weight), rows, *stacks, want_inner=want_inner, config=config)


def check(actual, expected, dtype):
    expected = expected.reshape(actual.shape)
    assert actual.numel()
    assert (actual.double() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


def check_kernel(layer, config=None):
    y, h, inner = layer.kernel(config)
    truth = layer.truth()
    check(y, truth[0], y.dtype)
    check(inner, truth[2], y.dtype)
    if (layer.index >= 0).any():
        check(h, truth[1], torch.bfloat16 if y.dtype in HALF else torch.float32)


def index_of(rows, adapters):
    """Some of each, and plain rows."""
    return [(5 * i * i + 3 * i) % (adapters + 1) - 1 for i in range(rows)]


# Rows and tokens that the choice of a launch takes for these forms, where it counts up to MOST tokens.
FORMS = {"single": (3, ()), "counted": (17, ()), "counted, tokens": (4, (5,)), "long": (3, (19,)), "listed": (45, ())}
MOST = 40


def small(form):
    """Tiles that few rows fill."""
    form, block_t = form.partition(",")[0], 1 if form == "single" else 16
    return configs.MixedConfig(
        form, block_t, 32, 16, 2, 4, 2, block_o=32, up_r=32, up_warps=4, up_t=16, rows=32, columns=64
    )


@pytest.fixture(autouse=True)
def _counts_fewer(monkeypatch):
    monkeypatch.setattr(row_configs, "COUNTED", MOST)
    configs.mixed_config.cache_clear()
    yield
    configs.mixed_config.cache_clear()


def test_choice_of_the_form():
    for form, (rows, tokens) in FORMS.items():
        sizes = 3, 40, 24, 8, torch.bfloat16, torch.bfloat16, CARDS["sm_90"]
        assert configs.mixed_config(rows, *(tokens or (1,)), *sizes).form == form.partition(",")[0]


SIZES = [(1, 40, 48, 1), (3, 33, 65, 16), (4, 32, 64, 24), (3, 20, 40, 70)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(form, sizes, device):
    rows, tokens = FORMS[form]
    ranks = sizes[3] in (24, 70)
    layer = Layer(index_of(rows, sizes[0]), tokens, sizes, torch.float32, torch.float32, device, ranks, bias=ranks)
    check_kernel(layer, small(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_dtypes(form, dtype, factor_dtype, device):
    """With the chosen launch."""
    rows, tokens = FORMS[form]
    check_kernel(Layer(index_of(rows, 3), tokens, (3, 24, 136, 16), dtype, factor_dtype, device, bias=rows != 17))


@pytest.mark.parametrize("form", FORMS)
def test_repeats_bitwise(form, device):
    """Also where inner is not wanted, and y is written over the base product."""
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 3), tokens, (3, 40, 64, 16), torch.float32, torch.float32, device)
    y, *_ = layer.kernel(small(form))
    assert torch.equal(layer.kernel(small(form))[0], y)
    assert torch.equal(layer.kernel(small(form), want_inner=False)[0], y)


INDICES = {
    "plain": [-1] * 20,
    "one adapter": [2] * 33,
    "all differ": list(range(18)),
    "sorted": [0] * 17 + [1] * 16 + [2] * 3,
    "in turns": [0, 1, 2] * 12,
    "one row": [1],
    "plain and one": [-1, 1] * 10,
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_indices(name, dtype, device):
    """Every other number of a longer vector."""
    bias = dtype is torch.int32
    layer = Layer(INDICES[name], (), (18, 20, 36, 4), torch.float32, torch.float32, device, bias=bias)
    layer.index = torch.stack([layer.index, layer.index + 1], 1).to(dtype)[:, 0]
    assert layer.index.stride() == (2,)
    check_kernel(layer, small("counted"))


@pytest.mark.parametrize("adapters", [1, 300])
def test_as_many_rows_as_are_counted(adapters, device):
    rows = 256 if adapters == 1 else 20
    layer = Layer(index_of(rows, adapters), (), (adapters, 24, 20, 3), torch.float32, torch.float32, device)
    check_kernel(layer, small("counted"))


@pytest.mark.parametrize("form", FORMS)
def test_strides(form, device):
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 3), tokens, (3, 40, 24, 4), torch.float32, torch.float32, device, ranks=True)
    expected = layer.kernel(small(form))
    layer.lora_A, layer.lora_B = layer.lora_A.mT.contiguous().mT, layer.lora_B.mT.contiguous().mT
    layer.magnitude, layer.norm = (torch.stack([t, t], 1)[:, 0] for t in (layer.magnitude, layer.norm))
    layer.x = torch.stack([layer.x, layer.x], -1)[..., 0] if not tokens else layer.x
    for actual, one in zip(layer.kernel(small(form)), expected, strict=True):
        torch.testing.assert_close(actual, one)
    layer.magnitude = layer.magnitude.T.contiguous().T
    torch.testing.assert_close(layer.kernel(small(form))[0], expected[0])


def test_plain_lora(device):
    """Without a magnitude; a number as the scaling."""
    layer = Layer(index_of(17, 3), (), (3, 40, 24, 4), torch.float32, torch.float32, device, bias=False)
    base = F.linear(layer.x, layer.weight)
    y, *_ = mixed(base, layer.x, layer.lora_A, layer.lora_B, None, None, 0.5, None, layer.index)
    layer.magnitude, layer.scaling = layer.norm, torch.full_like(layer.scaling, 0.5)
    check(y, layer.truth()[0], torch.float32)


def test_rows_see_their_adapter_alone(device):
    """Whatever the others hold, and beyond the ranks nothing is read."""
    for form, (rows, tokens) in FORMS.items():
        layer = Layer(
            [-1 if k == 0 else k for k in index_of(rows, 4)], tokens, (4, 40, 24, 24), *PAIRS[0], device, True
        )
        expected = layer.kernel(small(form))[0]
        for t in (layer.lora_A, layer.lora_B, layer.magnitude, layer.norm, layer.scaling):
            t[0] = float("nan")
        for k, rank in enumerate(layer.ranks.tolist()):
            layer.lora_A[k, -(-rank // 8) * 8 :] = layer.lora_B[k, :, -(-rank // 8) * 8 :] = float("nan")
        assert torch.equal(layer.kernel(small(form))[0], expected)


@pytest.mark.parametrize("size", ["rows", "tokens", "out", "in"])
def test_nothing_of_a_size(size, device):
    rows, tokens, sizes = (0 if size == "rows" else 3), (0,) if size == "tokens" else (), [2, 5, 6, 3]
    sizes[1], sizes[2] = 0 if size == "out" else 5, 0 if size == "in" else 6
    layer = Layer([1, -1, 0][:rows], tokens, sizes, torch.float32, torch.float32, device)
    y, *_ = layer.kernel()
    if size == "in":
        check(y, layer.truth()[0], torch.float32)
    else:
        assert y.numel() == 0


@pytest.mark.parametrize("block_t", [1, 4, 16])
def test_tiles_hold_each_token_once(block_t, device):
    for rows, tokens, adapters in ((1, 1, 1), (20, 3, 4), (40, 1, 300), (5, 40, 2)):
        index = torch.tensor(index_of(rows, adapters), device=device)
        tiles = list_tiles(index, tokens, adapters, block_t)
        assert len(tiles) == most_tiles(rows * tokens, adapters, block_t)
        of_token = index.repeat_interleave(tokens).tolist()
        seen = []
        for key, *held in tiles.tolist():
            held = [token for token in held if token >= 0]
            assert bool(held) == (key > -2)
            assert held == sorted(held)
            assert all(of_token[token] == key for token in held)
            seen += held
        assert sorted(seen) == list(range(rows * tokens))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrong", [4, -2])
@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on the device ends the process")
def test_out_of_range_is_asserted(form, wrong, monkeypatch):
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 4), tokens, (4, 5, 6, 3), torch.float32, torch.float32, "cpu")
    layer.index[-1] = wrong
    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, **ASSERTS))
    with pytest.raises(Exception, match=r"adapter_index is out of range|index out of range in self"):
        layer.kernel(small(form))


OUT_OF_RANGE = """
import torch
from dorac.functional import dora_linear_mixed
tensors = [torch.rand(s, device="cuda") for s in ((4, 16), (8, 16), (2, 4, 16), (2, 8, 4), (2, 8))]
index = torch.tensor([0, 1, 2, 0], device="cuda")
dora_linear_mixed(*tensors, adapter_index=index, scaling=1.0, weight_norm=torch.rand(2, 8, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_out_of_range_is_asserted_on_the_device():
    result = subprocess.run([sys.executable, "-c", OUT_OF_RANGE], env=os.environ, capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


# The norms


def norm_truth(layer, scaling):
    s = scaling.double().view(-1, 1, 1) if isinstance(scaling, torch.Tensor) else scaling
    delta = s * layer.lora_B.double() @ layer.lora_A.double()
    return torch.linalg.vector_norm(layer.weight.double() + delta, dim=-1)


def check_norm(norm, layer, scaling):
    truth = norm_truth(layer, scaling)
    split = layer.lora_A.dtype is torch.float32 and layer.weight.dtype is not torch.float32
    assert norm.dtype is torch.float32
    assert ((norm.double() - truth).abs() <= (4e-5 if split else 1e-6) * truth).all()


@pytest.mark.parametrize("sizes", [(2, 20, 40, 1), (5, 33, 70, 16)], ids=str)
@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_norms_together(sizes, dtype, factor_dtype, device):
    """Rows of zeros, a number, an element or a scaling for each; a transposed weight."""
    layer = Layer([0], (), sizes, dtype, factor_dtype, device)
    layer.weight[3], layer.lora_B[:, 3] = 0, 0
    scaling = 0.7 if factor_dtype is torch.float32 else torch.tensor(0.7, device=device)
    check_norm(stack_norm(layer.weight.T.contiguous().T, layer.lora_A, layer.lora_B, scaling), layer, scaling)
    config = configs.StackNormConfig(32, 64, 64, 4, 2, 4, 2)
    check_norm(stack_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, config), layer, layer.scaling)


def test_norms_whose_squares_overflow(device):
    """Of some of the adapters, in some rows."""
    layer = Layer([0], (), (3, 40, 70, 4), torch.float32, torch.float32, device)
    layer.weight[5] *= 1e25
    layer.lora_B[1, 7] *= 1e25
    check_norm(stack_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling), layer, layer.scaling)
    layer.lora_B[2, 4, 0] = float("nan")
    norm = stack_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    assert norm[2, 4] == float("inf")
    assert norm.isfinite().sum() == norm.numel() - 1


@pytest.mark.parametrize("rank", [8, 80])
@pytest.mark.parametrize("each", [True, False])
def test_mixed_norm(rank, each, path, device):
    """Of large ranks one after the other."""
    layer = Layer([0], (), (3, 20, 33, rank), torch.float32, torch.float32, device)
    scaling = layer.scaling if each else 0.7
    check_norm(functional.mixed_norm(layer.weight, layer.lora_A, layer.lora_B, scaling), layer, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_norm_in_aten(dtype):
    layer = Layer([0], (), (3, 20, 33, 8), dtype, dtype, "cpu")
    for scaling in (layer.scaling, 0.7):
        check_norm(functional.mixed_norm(layer.weight, layer.lora_A, layer.lora_B, scaling), layer, scaling)
        chunked = functional.mixed_norm(layer.weight, layer.lora_A, layer.lora_B, scaling, budget=1)
        check_norm(chunked, layer, scaling)


# The function


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    """Has tensors on the CPU take the kernels, too; an entry for each call that took the plan in eager."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
    taken = []
    run = eager_mixed._run
    monkeypatch.setattr(eager_mixed, "_run", lambda *arguments: taken.append("eager") or run(*arguments))
    return taken


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_function(form, dtype, factor_dtype, path, device):
    rows, tokens = FORMS[form]
    number = factor_dtype is torch.float32
    layer = Layer(index_of(rows, 3), tokens, (3, 40, 24, 8), dtype, factor_dtype, device, bias=rows != 17)
    if number:
        layer.scaling.fill_(0.5)
    options = {"scaling": 0.5} if number else {}
    with torch.no_grad():
        y = layer.function(**options)
        again = layer.function(**options)
    assert path == ["eager"] * 2
    assert len(eager.plans) == 1
    assert torch.equal(y, again)
    assert y.dtype is dtype
    check(y, layer.truth()[0], dtype)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, path, device):
    rows, tokens = FORMS[form]
    dtype = torch.float16 if form == "single" else torch.bfloat16
    layer = Layer(index_of(rows, 3), tokens, (3, 40, 24, 8), torch.float32, torch.float32, device)
    with torch.no_grad(), torch.autocast(device, dtype):
        y = layer.function()
    assert path == ["eager"]
    assert y.dtype is dtype
    check(y, layer.truth()[0], dtype)


@pytest.mark.parametrize("form", FORMS)
def test_other_ways_have_the_same_values(form, path, device):
    """With gradients, seen by a mode, and compiled."""
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 3), tokens, (3, 40, 24, 8), torch.float32, torch.float32, device)
    compiled = torch.compile(layer.function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = layer.function()
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(layer.function(), y)
        products = 2 * rows * (tokens or (1,))[0] * (40 * 24 + 8 * (40 + 24))
        assert counter.get_total_flops() == (products if device == "cpu" else counter.get_total_flops()) >= products
        torch.testing.assert_close(compiled(), y)
    layer.lora_B.requires_grad_()
    torch.testing.assert_close(layer.function(), y)
    assert path == ["eager"]


def test_what_is_not_for_a_plan_is_computed_all_the_same(path, device):
    layer = Layer(index_of(17, 3), (), (3, 40, 24, 8), torch.float32, torch.float32, device)
    expected = layer.truth()[0]
    with torch.no_grad():
        for change in ("norm", "magnitude", "x", "index", "aligned"):
            changed = Layer.__new__(Layer)
            vars(changed).update(vars(layer))
            options = {}
            if change == "norm":
                norm = functional.mixed_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
                changed.norm, options = norm, {"weight_norm": None}
            elif change == "aligned":
                changed.x = torch.cat([layer.x.flatten()[:1], layer.x.flatten()])[1:].view_as(layer.x)
            else:
                setattr(changed, change, torch.stack([getattr(layer, change)] * 2, -1)[..., 0])
            check(changed.function(**options), changed.truth()[0] if change == "norm" else expected, torch.float32)
    assert not path


@pytest.mark.parametrize("argument", ["adapter_index", "ranks"])
def test_refuses(argument, path, device):
    layer = Layer(index_of(17, 3), (), (3, 40, 24, 8), torch.float32, torch.float32, device)
    right = {"adapter_index": layer.index, "ranks": torch.tensor([8, 8, 8], device=device)}[argument]
    for wrong in (right.float(), right[:-1], right[None], right.tolist(), right.to("meta")):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"{argument} must"):
            layer.function(**{argument: wrong})
    with torch.no_grad():
        with pytest.raises(ValueError, match="scaling must be finite in float32"):
            layer.function(scaling=float("nan"))
        with pytest.raises(ValueError, match="norm_grad"):
            layer.function(norm_grad=True)
        with pytest.raises(ValueError, match="budget must be"):
            layer.function(budget=0)


def gradients(layer, dy, names=("x", "lora_A", "lora_B", "magnitude", "bias"), **options):
    """The result and its gradients by name."""
    present = [name for name in names if getattr(layer, name) is not None]
    for name in present:
        getattr(layer, name).requires_grad_()
    y = layer.function(**options)
    return y, dict(zip(present, torch.autograd.grad(y, [getattr(layer, n) for n in present], dy.to(y)), strict=True))


def gradient_truth(layer, dy):
    wide = Layer.__new__(Layer)
    vars(wide).update(
        {name: t if t is None or not t.is_floating_point() else t.detach().double() for name, t in vars(layer).items()}
    )
    names = [name for name in ("x", "lora_A", "lora_B", "magnitude", "bias") if getattr(layer, name) is not None]
    for name in names:
        getattr(wide, name).requires_grad_()
    y = wide.truth()[0]
    found = torch.autograd.grad(y, [getattr(wide, name) for name in names], dy.double().view_as(y), allow_unused=True)
    return {n: torch.zeros_like(getattr(wide, n)) if d is None else d for n, d in zip(names, found, strict=True)}


@pytest.fixture
def backwards(monkeypatch) -> list[bool]:
    """An entry for each backward pass of the kernels."""
    taken, leaf = [], ops_mixed.mixed_backward
    monkeypatch.setattr(ops_mixed, "mixed_backward", lambda *arguments: taken.append(True) or leaf(*arguments))
    return taken


@pytest.mark.parametrize("form", ["single", "counted, tokens", "listed"])
@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_gradients(form, dtype, factor_dtype, path, backwards, device):
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 3), tokens, (4, 40, 24, 8), dtype, factor_dtype, device, bias=form != "single")
    assert 3 not in layer.index
    dy = torch.randn(rows, *tokens, 40, device=device).to(dtype)
    y, found = gradients(layer, dy)
    check(y, layer.truth()[0], dtype)
    for name, expected in gradient_truth(layer, dy).items():
        assert found[name].dtype is getattr(layer, name).dtype
        check(found[name], expected, dtype)
        if name in ("lora_A", "lora_B", "magnitude"):
            assert (found[name][3] == 0).all()
    assert backwards == [True]
    again = gradients(layer, dy)[1]
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_under_autocast(dtype, path, backwards, device):
    layer = Layer(index_of(9, 3), (), (3, 40, 24, 8), torch.float32, torch.float32, device)
    dy = torch.randn(9, 40, device=device).to(dtype)
    with torch.autocast(device, dtype):
        y, found = gradients(layer, dy)
    assert y.dtype is dtype
    for name, expected in gradient_truth(layer, dy).items():
        assert found[name].dtype is torch.float32
        check(found[name], expected, dtype)
    assert backwards == [True]


def test_all_rows_plain_or_of_one_adapter(path, backwards, device):
    for index in ([-1] * 5, [1] * 5):
        layer = Layer(index, (), (2, 20, 12, 3), torch.float32, torch.float32, device)
        dy = torch.randn(5, 20, device=device)
        found = gradients(layer, dy)[1]
        for name, expected in gradient_truth(layer, dy).items():
            assert (found[name].double() - expected).abs().max() <= 1e-5 * (expected.abs().max() + 1)
    assert len(backwards) == 2


@pytest.mark.parametrize("trained", ["x", "lora_A", "magnitude", "bias", "weight", "scaling", "norm"])
def test_one_gradient(trained, path, backwards, device):
    """What the kernels do not train they leave to aten."""
    layer = Layer(index_of(9, 3), (), (3, 20, 12, 4), torch.float32, torch.float32, device)
    dy = torch.randn(9, 20, device=device)
    _, found = gradients(layer, dy, (trained,))
    layer.ranks = torch.tensor([4, 4, 4], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "has_kernels", lambda *tensors: False)
        _, expected = gradients(layer, dy, (trained,))
    torch.testing.assert_close(found, expected)
    assert len(backwards) == (trained not in ("weight", "scaling", "norm"))


def test_second_derivatives(path, device):
    layer = Layer(index_of(9, 3), (), (3, 20, 12, 4), torch.float32, torch.float32, device)
    names = ("x", "lora_A", "lora_B", "magnitude", "bias")
    results = []
    for has_kernels in (front.has_kernels, lambda *tensors: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(front, "has_kernels", has_kernels)
            leaves = [getattr(layer, name).requires_grad_() for name in names]
            first = torch.autograd.grad(layer.function().sin().sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for found, expected in zip(*results, strict=True):
        assert rms_error(found, expected) <= 64 * torch.finfo(torch.float32).eps * expected.square().mean().sqrt()


@st.composite
def layers(draw):
    """Any index over any stack."""
    adapters = draw(st.integers(1, 6))
    index = draw(st.lists(st.integers(-1, adapters - 1), min_size=1, max_size=30))
    tokens = draw(st.sampled_from([(), (1,), (3,), (2, 9)]))
    sizes = adapters, draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 70))
    torch.manual_seed(draw(st.integers(0, 999)))
    form = draw(st.sampled_from(["single", "counted", "listed", "long"]))
    pair, ranks, bias = draw(st.sampled_from(PAIRS)), draw(st.booleans()), draw(st.booleans())
    return Layer(index, tokens, sizes, *pair, "cuda" if torch.cuda.is_available() else "cpu", ranks, bias), small(form)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=5, derandomize=True, database=None, **COMMON)
@given(case=layers())
def test_random_cases(case):
    check_kernel(*case)


@pytest.mark.full
@settings(max_examples=2000, **COMMON)
@given(case=layers())
def test_two_thousand_random_cases(case):
    check_kernel(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph(form):
    """Replayed with another index, ranks and adapters, it has eager's bits."""
    rows, tokens = FORMS[form]
    layer = Layer(index_of(rows, 5), tokens, (5, 136, 264, 16), torch.bfloat16, torch.bfloat16, "cuda", ranks=True)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.function()
        for turn in range(4):
            layer.index.copy_(torch.randint(-1, 5, (rows,)))
            layer.lora_B.normal_()
            layer.ranks.fill_(16 - 4 * turn)
            graph.replay()
            assert torch.equal(y, layer.function())
