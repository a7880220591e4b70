"""Rows sorted by segment: the Triton kernels (``kernels/segments.py``), and the experts' layer that launches them.

On the CPU the kernels run in Triton's interpreter.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_layers import SCALING, budgets, grouped
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, reference
from dorac.ops import eager_grouped, front, library
from dorac.testing import max_error, rms_error

pytest.importorskip("triton")

from dorac.kernels import configs, segment_tiles, segments

HALF, WIDE = torch.bfloat16, torch.float32
DTYPES = [(HALF, HALF), (HALF, WIDE), (torch.float16, WIDE), (WIDE, WIDE)]
dtypes = pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
NAMES = "x", "weight", "lora_A", "lora_B", "magnitude", "bias"
# Ends of the segments' rows, how many rows there are; out, in and rank.
CASES = {
    "one of many": ([0, 0, 20, 20], 20, (33, 24, 16)),
    "a tail": ([3, 3, 5, 6], 9, (17, 24, 5)),
    "many rows": ([70, 75, 200], 200, (130, 40, 24)),
    "one row": ([1], 1, (5, 9, 1)),
    "even": ([32, 64], 64, (128, 128, 16)),
    "large rank": ([5, 20], 20, (24, 16, 70)),
    "a tail alone": ([0, 0], 7, (16, 16, 4)),
}
SAMPLED = {
    ("one of many", HALF, WIDE),
    ("a tail", HALF, HALF),
    ("a tail", WIDE, WIDE),
    ("one row", torch.float16, WIDE),
    ("large rank", HALF, WIDE),
}
cases = pytest.mark.parametrize(
    ("case", "dtype", "factor_dtype"),
    [
        pytest.param(*key, marks=() if key in SAMPLED else pytest.mark.full, id=" ".join(map(str, key)))
        for key in ((case, *pair) for case in CASES for pair in DTYPES)
    ],
)


class Inputs:
    """Random tensors of segments, in the kernels' dtypes."""

    def __init__(self, ends, rows, sizes, dtype, factor_dtype, device, index_dtype=torch.int32):
        (out, length, rank), count = sizes, len(ends)

        def draw(*shape, to=dtype):
            return torch.randn(shape, dtype=torch.float64).to(device, to)

        self.base, self.x, self.dy = draw(rows, out), draw(rows, length), draw(rows, out)
        self.h = draw(rows, rank, to=factor_dtype)
        self.lora_A, self.lora_B = draw(count, rank, length, to=factor_dtype), draw(count, out, rank, to=factor_dtype)
        self.magnitude, self.norm = (draw(count, out, to=WIDE).abs() + 0.5 for _ in range(2))
        self.bias = draw(count, out)
        self.offsets = torch.tensor(ends, dtype=index_dtype, device=device)
        self.ends = ends

    def rows(self):
        """Each segment's number and rows."""
        starts = [0, *self.ends][:-1]
        return [(e, slice(*bounds)) for e, bounds in enumerate(zip(starts, self.ends, strict=True))]


def s_of(scaling, segment):
    return scaling[segment].double() if isinstance(scaling, torch.Tensor) and scaling.ndim else float(scaling)


def scaling_of(case, count, device):
    """A number, an element, or one for each segment: another for each case."""
    each = 0.7, torch.full((), 0.7, device=device), torch.rand(count, device=device) + 0.5
    return each[[*CASES].index(case) % 3]


def check(actual, truth, exact, label, like):
    """To the last digit of the dtype, or nearly that of float32 where nothing is rounded to half precision."""
    step = 2**-22 if exact else {HALF: 2**-7, torch.float16: 2**-10, WIDE: 2**-21}[like]
    assert actual.shape == truth.shape, label
    if truth.numel():
        assert max_error(actual, truth) <= 4 * step * (truth.abs().max() + 1e-30), label


@cases
def test_compose(case, dtype, factor_dtype, device):
    ends, rows, sizes = CASES[case]
    i = Inputs(ends, rows, sizes, dtype, factor_dtype, device)
    scaling = scaling_of(case, len(ends), device)
    for delta, bias in ((False, i.bias), (True, None)):
        inner, y = torch.zeros_like(i.base, dtype=torch.float64), torch.zeros_like(i.base, dtype=torch.float64)
        for e, r in i.rows():
            low = s_of(scaling, e) * i.h[r].double() @ i.lora_B[e].double().T
            g = (i.magnitude[e] / i.norm[e]).double()
            inner[r] = i.base[r].double() + low
            y[r] = g * inner[r] - (i.base[r].double() if delta else 0) + (0 if bias is None else bias[e].double())
        layer = i.base, i.h, i.lora_B, i.magnitude, i.norm, scaling, bias, i.offsets
        actual, kept = segments.segment_compose(*layer, delta=delta, want_inner=True)
        check(actual, y, False, "y", dtype)
        check(kept, inner, False, "inner", dtype)
        alone, none = segments.segment_compose(*layer, delta=delta)
        assert none is None
        assert torch.equal(alone, actual)
    where = i.base.clone()
    y, kept = segments.segment_compose(where, *layer[1:], delta=delta, want_inner=True, over_base=True)
    assert kept is where
    assert torch.equal(y, actual)
    # The product alone, and added where it lies.
    product, _ = segments.segment_compose(None, i.h, i.lora_B, None, None, 1.0, None, i.offsets)
    expected = torch.zeros(rows, sizes[0], dtype=torch.float64, device=device)
    for e, r in i.rows():
        expected[r] = i.h[r].double() @ i.lora_B[e].double().T
    check(product, expected, False, "product", factor_dtype if factor_dtype.itemsize == 2 else WIDE)


@cases
def test_product(case, dtype, factor_dtype, device):
    ends, rows, (out, length, rank) = CASES[case]
    splits = None if len(ends) % 2 else 3
    i = Inputs(ends, rows, (out, length, rank), dtype, factor_dtype, device, torch.int64)
    config = None if splits is None else configs.ProductConfig(16, 16, 16, splits, 4, 2)
    h, d_h = (torch.zeros(rows, rank, dtype=torch.float64, device=device) for _ in range(2))
    for e, r in i.rows():
        h[r] = i.x[r].double() @ i.lora_A[e].double().T
        g_b = (i.magnitude[e] / i.norm[e]).double().unsqueeze(-1) * i.lora_B[e].double()
        d_h[r] = 0.7 * i.dy[r].double() @ g_b
    exact = factor_dtype is WIDE
    check(segments.segment_product(i.x, i.lora_A, i.offsets, config=config), h, exact, "h", factor_dtype)
    given = {"magnitude": i.magnitude, "weight_norm": i.norm, "scaling": 0.7, "config": config}
    check(segments.segment_product(i.dy, i.lora_B.mT, i.offsets, **given), d_h, exact, "d_h", factor_dtype)


@cases
def test_backward(case, dtype, factor_dtype, device):
    ends, rows, (out, length, rank) = CASES[case]
    strips = len(ends) % 2 == 0
    i = Inputs(ends, rows, (out, length, rank), dtype, factor_dtype, device)
    config = configs.SegmentConfig(16, 32, 32, 4, 2, 16) if strips else None
    inner = i.base
    scaling = scaling_of(case, len(ends), device)
    for delta in (False, True):
        d_base = torch.zeros(rows, out, dtype=torch.float64, device=device)
        d_m, d_bias = (torch.zeros(len(ends), out, dtype=torch.float64, device=device) for _ in range(2))
        d_b = torch.zeros(len(ends), out, rank, dtype=torch.float64, device=device)
        d_a = torch.zeros(len(ends), rank, length, dtype=torch.float64, device=device)
        for e, r in i.rows():
            g, s, dy = (i.magnitude[e] / i.norm[e]).double(), s_of(scaling, e), i.dy[r].double()
            d_base[r] = (g - int(delta)) * dy
            d_m[e], d_bias[e] = (dy * inner[r].double()).sum(0) / i.norm[e].double(), dy.sum(0)
            d_b[e] = s * (g * dy).T @ i.h[r].double()
            d_a[e] = s * i.h[r].double().T @ i.x[r].double()
        layer = inner, i.magnitude, i.norm, i.h, scaling, i.offsets
        found = segments.segment_backward(i.dy, *layer, delta=delta, bias_dtype=WIDE, config=config)
        for name, actual, truth in zip(
            ("d_base", "d_m", "d_b", "d_bias"), found, (d_base, d_m, d_b, d_bias), strict=True
        ):
            exact = name in ("d_m", "d_bias") or (name == "d_b" and factor_dtype is WIDE)
            check(actual, truth, exact, name, dtype)
        without = segments.segment_backward(i.dy, *layer, delta=delta, config=config)
        assert without[3] is None
        assert all(torch.equal(a, b) for a, b in zip(found[:3], without[:3], strict=True))
        to = torch.empty_like(i.lora_A)
        segments.segment_backward(i.x, None, None, None, *layer[3:], d_lora_B=to.mT, config=config)
        check(to, d_a, factor_dtype is WIDE, "d_a", factor_dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_in_any_order(index_dtype, device):
    """As of a mixed batch: sorted by an order, and nothing is moved; the tail is the layer without an adapter."""
    dtype, factor_dtype = HALF, WIDE if index_dtype is torch.int32 else HALF
    ends, rows, (out, length, rank) = [4, 4, 20], 23, (40, 24, 20)
    i = Inputs(ends, rows, (out, length, rank), dtype, factor_dtype, device)
    order = torch.randperm(rows, device=device)
    scaling, bias = torch.rand(3, device=device), i.bias[0]
    sorted_rows = [t[order] for t in (i.base, i.h, i.x, i.dy)]
    order = order.to(index_dtype)
    layer = i.lora_B, i.magnitude, i.norm, scaling, bias, i.offsets
    y, inner = segments.segment_compose(i.base, i.h, *layer, order, want_inner=True, plain_tail=True)
    expected, kept = segments.segment_compose(*sorted_rows[:2], *layer, want_inner=True, plain_tail=True)
    assert torch.equal(y[order], expected)
    assert torch.equal(inner[order], kept)
    check(expected[20:], sorted_rows[0][20:].double() + bias.double(), False, "plain", dtype)
    assert (kept[20:] == 0).all()
    h = segments.segment_product(i.x, i.lora_A, i.offsets, order)
    assert torch.equal(h[order], segments.segment_product(sorted_rows[2], i.lora_A, i.offsets))
    given = i.magnitude, i.norm
    found = segments.segment_backward(i.dy, inner, *given, i.h, scaling, i.offsets, order)
    expected = segments.segment_backward(sorted_rows[3], kept, *given, sorted_rows[1], scaling, i.offsets)
    assert torch.equal(found[0][order], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1:3], expected[1:3], strict=True))


def test_any_strides(device):
    dtype, factor_dtype = HALF, WIDE
    ends, rows, (out, length, rank) = [4, 4, 20], 22, (24, 40, 7)
    i = Inputs(ends, rows, (out, length, rank), dtype, factor_dtype, device)
    by_columns = lambda t: t.mT.contiguous().mT  # noqa: E731
    vectors = [t.repeat_interleave(2, 1)[:, ::2] for t in (i.magnitude, i.norm, i.bias)]
    y, inner = segments.segment_compose(
        *(by_columns(t) for t in (i.base, i.h, i.lora_B)), *vectors[:2], 0.7, vectors[2], i.offsets, want_inner=True
    )
    layer = i.base, i.h, i.lora_B, i.magnitude, i.norm, 0.7, i.bias, i.offsets
    for actual, expected in zip((y, inner), segments.segment_compose(*layer, want_inner=True), strict=True):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous()
    h = segments.segment_product(by_columns(i.x), by_columns(i.lora_A), i.offsets)
    assert torch.equal(h, segments.segment_product(i.x, i.lora_A, i.offsets))
    found = segments.segment_backward(*map(by_columns, (i.dy, inner)), *vectors[:2], by_columns(i.h), 0.7, i.offsets)
    expected = segments.segment_backward(i.dy, inner, i.magnitude, i.norm, i.h, 0.7, i.offsets)
    assert torch.equal(found[0], expected[0])
    # Sums over at most 22 rows, in another order: each is off by less than 22 roundings of all that is added.
    terms = segments.segment_backward(i.dy.abs(), inner.abs(), i.magnitude.abs(), i.norm, i.h.abs(), 0.7, i.offsets)
    for actual, wanted, of_all in zip(found[1:3], expected[1:3], terms[1:3], strict=True):
        assert ((actual - wanted).abs() <= 22 * torch.finfo(torch.float32).eps * of_all).all()


@pytest.mark.parametrize("ends", [[5, 3, 9], [-4, 20, 30], [0, 0, 0]])
def test_wrong_offsets_stay_within_bounds(ends, device):
    i = Inputs([3, 5, 9], 9, (16, 16, 4), WIDE, WIDE, device)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    layer = i.lora_B, i.magnitude, i.norm, 0.7, i.bias, offsets
    y, inner = segments.segment_compose(i.base, i.h, *layer, want_inner=True)
    assert y.shape == inner.shape == (9, 16)
    segments.segment_product(i.x, i.lora_A, offsets)
    segments.segment_backward(i.dy, i.base, i.magnitude, i.norm, i.h, 0.7, offsets)


@pytest.mark.parametrize("count", [1, 5])
def test_more_segments_than_a_step_looks_at(count, device, monkeypatch):
    monkeypatch.setattr(segment_tiles, "BLOCK_E", 2)
    segments.segment_product_launches.cache_clear()
    ends = torch.randint(0, 3, (count,)).cumsum(0).tolist()
    i = Inputs(ends, ends[-1] + 2, (16, 24, 4), WIDE, WIDE, device)
    h = torch.zeros(ends[-1] + 2, 4, dtype=torch.float64, device=device)
    for e, r in i.rows():
        h[r] = i.x[r].double() @ i.lora_A[e].double().T
    check(segments.segment_product(i.x, i.lora_A, i.offsets), h, False, "h", WIDE)
    d_b = segments.segment_backward(i.dy, None, None, None, i.h, 1.0, i.offsets)[2]
    expected = torch.stack([i.dy[r].double().T @ i.h[r].double() for _, r in i.rows()])
    check(d_b, expected, False, "d_b", WIDE)
    segments.segment_product_launches.cache_clear()
    segments.segment_backward_launches.cache_clear()


def test_tiles_of_rows_are_enough():
    """Of every way to part few rows: never fewer tiles than are needed, and as many for the worst."""
    for rows, parts, per_tile in itertools.product(range(9), (1, 2, 3), (1, 2, 4)):
        needed = max(
            sum(-(-n // per_tile) for n in counts)
            for counts in itertools.product(range(rows + 1), repeat=parts + 1)
            if sum(counts) == rows
        )
        assert segments.row_tiles(rows, parts, per_tile) == needed


# ---- The layer of experts over these kernels. ----


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    """Has tensors on the CPU take the GPU's way, too; what took the eager path since, "training" or "inference"."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
        monkeypatch.setattr(library, "on_gpu", lambda tensor: tensor.dtype.itemsize < 8)
    taken = []
    forward = eager_grouped._forward

    def spy(*arguments):
        taken.append("training" if arguments[-1] else "inference")
        return forward(*arguments)

    monkeypatch.setattr(eager_grouped, "_forward", spy)
    return taken


ENDS = [10, 10, 21]


def drawn(ends, tail, sizes, dtype, factor_dtype, device, **options):
    """The layer, and its tensors with the base frozen."""
    layer = grouped(torch.tensor(ends, dtype=torch.int32), tail)
    inputs = layer.inputs(*sizes, dtype=dtype, factor_dtype=factor_dtype, device=device, **options).leaves()
    inputs.weight.requires_grad_(False)
    return layer, inputs.tensors()


def check_layer(layer, tensors, scaling=SCALING, norm=None, **options):
    """y and every gradient within the budget of the textbook's."""
    trained = {n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None and t.requires_grad}
    y = layer.function(*tensors, scaling=scaling, weight_norm=norm, **options)
    dy = torch.randn_like(y)
    grads = dict(zip(trained, torch.autograd.grad(y, list(trained.values()), dy), strict=True))
    bounds = budgets(layer, tensors, dy=dy, scaling=scaling, weight_norm=norm)
    bounds["y"].check(y, "y")
    for name, grad in grads.items():
        assert grad.dtype is trained[name].dtype
        bounds[name].check(grad, name)


@pytest.mark.parametrize("factor_dtype", [HALF, WIDE])
@pytest.mark.parametrize(
    ("sizes", "bias", "transposed"),
    [
        ((24, 16, 16), "frozen", True),
        ((32, 8, 5), "trained", False),
        pytest.param((136, 40, 100), None, False, marks=pytest.mark.full),
    ],
)
def test_eager_values_and_gradients(factor_dtype, transposed, sizes, bias, path, device):
    """Llama 4's and GPT-OSS' weights are views of transposed ones."""
    layer, tensors = drawn(ENDS, 3, sizes, HALF, factor_dtype, device, bias=bias is not None, transposed=transposed)
    if bias == "frozen":
        tensors[5].requires_grad_(False)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    if transposed:  # side by side with another projection's, as DoraExperts keeps them
        norm = torch.cat([norm, norm], 1)[:, : norm.shape[1]]
    check_layer(layer, tensors, norm=norm)
    assert path == ["training"]


def test_eager_inference(path, device):
    layer, tensors = drawn(ENDS, 3, (24, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    expected = layer.function(*tensors, scaling=SCALING, weight_norm=norm)
    with torch.no_grad():
        y = layer.function(*tensors, scaling=SCALING, weight_norm=norm)
    assert path == ["training", "inference"]
    assert torch.equal(y, expected)
    assert y._base is None


@pytest.mark.parametrize("kind", ["number", "0-d", "each"])
def test_scalings(kind, path, device):
    layer, tensors = drawn(ENDS, 0, (24, 16, 4), HALF, HALF, device)
    scaling = {
        "number": 0.7,
        "0-d": torch.tensor(0.7, device=device),
        "each": torch.tensor([0.5, 1.0, 2.0], device=device),
    }
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), 1.0)
    check_layer(layer, tensors, scaling[kind], norm)
    assert path == ["training"]
    path.clear()
    if kind == "each":  # and with norms of these
        check_layer(layer, tensors, scaling[kind])
        assert path == ["training"]


@dtypes
@pytest.mark.parametrize("sizes", [(24, 16, 16), pytest.param((17, 9, 5), marks=pytest.mark.full)])
def test_ops_over_the_kernels(dtype, factor_dtype, sizes, path, device, monkeypatch):
    """As under the compiler, without the eager path."""
    monkeypatch.setattr(eager_grouped, "dora_linear_grouped", lambda *tensors: None)
    layer, tensors = drawn(ENDS, 3, sizes, dtype, factor_dtype, device)
    check_layer(layer, tensors)
    assert not path


def test_steps_aside(path, device):
    layer, tensors = drawn(ENDS, 0, (24, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    given = {"scaling": SCALING, "weight_norm": norm}
    layer.function(*tensors, **given, dropout_p=0.5)
    layer.function(tensors[0].half(), *(None if t is None else t.half() for t in tensors[1:]), **given)
    x, weight, lora_A, lora_B, magnitude, bias = tensors
    layer.function(x, weight, lora_A, lora_B, magnitude.detach(), bias, **given)
    layer.function(x, weight.clone().requires_grad_(), lora_A, lora_B, magnitude, bias, **given)
    with torch.autocast(device, dtype=HALF):
        layer.function(x, weight, lora_A, lora_B, magnitude, bias, **given)
    torch.func.vmap(lambda x: layer.function(x, weight, lora_A, lora_B, magnitude, bias, **given))(x[None])
    assert not path
    layer.function(*tensors, **given)
    layer.function(*tensors, scaling=SCALING)
    assert path == ["training"] * 2


def test_differentiated_again(path, device):
    layer, tensors = drawn(ENDS, 3, (16, 8, 4), HALF, WIDE, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    leaves = [t for t in tensors if t.requires_grad]

    def second(*tensors):
        leaves = [t for t in tensors if t.requires_grad]
        y = layer.function(*tensors, scaling=SCALING, weight_norm=norm.to(tensors[4].dtype))
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = second(*tensors)
    assert path == ["training"]
    exact = second(*(t.detach().double().requires_grad_(t.requires_grad) for t in tensors))
    for actual, truth, leaf in zip(found, exact, leaves, strict=True):
        assert actual.dtype is leaf.dtype
        assert max_error(actual, truth) <= 0.05 * truth.abs().max()


@pytest.mark.parametrize("where", ["forward", "again", pytest.param("both", marks=pytest.mark.full)])
def test_a_mode_over_a_part_of_a_checkpoint(where, path, device):
    """Which sees ops in one of both runs, or in both: the same tensors are saved."""
    layer, tensors = drawn(ENDS, 3, (24, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    leaves = [t for t in tensors if t.requires_grad]

    def run(*tensors):
        return layer.function(*tensors, scaling=SCALING, weight_norm=norm)

    expected = torch.autograd.grad(run(*tensors).sum(), leaves)
    counter = FlopCounterMode(display=False)
    if where != "again":
        with counter:
            y = checkpoint(run, *tensors, use_reentrant=False)
    else:
        y = checkpoint(run, *tensors, use_reentrant=False)
    if where != "forward":
        with counter:
            found = torch.autograd.grad(y.sum(), leaves)
    else:
        found = torch.autograd.grad(y.sum(), leaves)
    assert counter.get_total_flops() > 0
    for a, b in zip(found, expected, strict=True):
        assert rms_error(a, b) <= 2 * torch.finfo(HALF).eps * b.double().square().mean().sqrt(), rms_error(a, b)


def test_repeats_bitwise(path, device):
    """A layer; and a segment with several strips."""
    layer, tensors = drawn(ENDS, 3, (16, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        y = layer.function(*tensors, scaling=SCALING, weight_norm=norm)
        return y, *torch.autograd.grad(y.float().sin().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert path == ["training"] * 2
    i = Inputs([0, 90], 90, (16, 16, 4), HALF, WIDE, device)
    config = configs.SegmentConfig(16, 16, 32, 4, 2, 16)
    layer = i.base, i.magnitude, i.norm, i.h, 0.7, i.offsets
    first, second = (segments.segment_backward(i.dy, *layer, bias_dtype=WIDE, config=config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("family", "known"),
    [("gpt_oss", True), *(pytest.param(*of, marks=pytest.mark.full) for of in (("gpt_oss", False), ("mixtral", True)))],
)
def test_modules_take_the_path(family, known, path, device):
    """Both projections of Mixtral's and GPT-OSS' experts, with factors in float32; the norms known, or not."""
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments, dense_forward

    layer = adapted(family, HALF).to(device)
    args = [t.to(device) for t in arguments(family, dtype=HALF)]
    if known:
        norms = layer._norm().detach()
        layer._known_norm = lambda: norms
    leaves = [*layer.parameters(recurse=False)]
    y = layer(*args)
    found = torch.autograd.grad(y.sum(), leaves)
    assert path == ["training"] * 2
    exact = dense_forward(layer, args, torch.float64)
    truth = torch.autograd.grad(exact.sum(), leaves)
    for actual, expected in zip((y, *found), (exact, *truth), strict=True):
        assert max_error(actual, expected.double()) <= 0.03 * expected.abs().max()
    with torch.no_grad():
        assert torch.equal(layer(*args), y)


@st.composite
def routings(draw, pairs=DTYPES):
    """How many rows each expert gets and the tail, the sizes of the layer, dtypes and a seed.

    17 rows are two tiles of them, and 17 outputs or inputs two of the smallest that there are.
    """
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17]), min_size=1, max_size=4))
    sizes = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 16, 24]))
    if draw(st.booleans()):  # which torch's grouped GEMM takes
        sizes = 8 * draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3)), sizes[2]
    return counts, draw(st.integers(0, 3)), sizes, draw(st.sampled_from(pairs)), draw(st.integers(0, 2**16))


def check_routing(routing):
    counts, tail, sizes, of_dtypes, seed = routing
    if not sum(counts) + tail:
        return
    ends = torch.tensor(counts).cumsum(0).tolist()
    layer, tensors = drawn(ends, tail, sizes, *of_dtypes, "cpu" if not torch.cuda.is_available() else "cuda", seed=seed)
    norm = reference.row_norm(*(t.detach().double() for t in tensors[1:4]), SCALING).float()
    check_layer(layer, tensors, norm=norm)


COMMON = {"deadline": None, "suppress_health_check": [*HealthCheck]}


@pytest.mark.usefixtures("path")
@settings(max_examples=4, derandomize=True, database=None, **COMMON)
@given(routing=routings())
def test_random_routings(routing):
    check_routing(routing)


@pytest.fixture
def quick_interpreter(monkeypatch):
    """A launch puts Triton's interpreter in the place of its language; so does each function called, here only once.

    That takes longer than most of these functions.
    """
    interpreter, known = pytest.importorskip("triton.runtime.interpreter"), set()
    stock = interpreter.InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in known:  # its own, over a part that launches leave alone
            known.add(module)
            return stock(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.mark.full
@dtypes
@pytest.mark.usefixtures("path", "quick_interpreter")
@settings(max_examples=500, **COMMON)
@given(data=st.data())
def test_two_thousand_routings(dtype, factor_dtype, data):
    check_routing(data.draw(routings([(dtype, factor_dtype)])))


@pytest.mark.gpu
@pytest.mark.parametrize("factor_dtype", [HALF, WIDE])
@pytest.mark.parametrize("sizes", [(48, 32, 16), (136, 40, 5)])
def test_a_graph_replays_other_offsets(factor_dtype, sizes):
    """And a capture forbids what waits for the device."""
    _, tensors = drawn([30, 30, 70], 30, sizes, HALF, factor_dtype, "cuda")
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    offsets = torch.tensor([30, 30, 70], dtype=torch.int32, device="cuda")
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        y = functional.dora_linear_grouped(*tensors, offsets=offsets, scaling=SCALING, weight_norm=norm)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run()
    for ends in ([0, 100, 100], [1, 2, 99], [33, 66, 90], [0, 0, 0]):
        offsets.copy_(torch.tensor(ends))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(static, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_pair", DTYPES[:2], ids=["half", "wide"])
def test_no_synchronisation(dtype_pair):
    _, tensors = drawn([30, 30, 70], 30, (48, 32, 20), *dtype_pair, "cuda")
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    offsets = torch.tensor([30, 30, 70], dtype=torch.int32, device="cuda")

    def run(**given):
        y = functional.dora_linear_grouped(*tensors, offsets=offsets, scaling=SCALING, **given)
        torch.autograd.grad(y.sum(), [t for t in tensors if t.requires_grad])

    run(weight_norm=norm)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(weight_norm=norm)
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
