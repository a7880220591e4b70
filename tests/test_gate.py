"""A gate behind the projection of all experts (``functional.Gate``), and the kernels that have it inside.

On the CPU the kernels run in Triton's interpreter.
"""

import copy
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from row_layers import SCALING
from test_segments import (  # noqa: F401
    COMMON,
    ENDS,
    HALF,
    WIDE,
    Inputs,
    check,
    drawn,
    path,
    quick_interpreter,
    routings,
    s_of,
)
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, reference
from dorac.functional import Gate
from dorac.ops import eager_grouped
from dorac.testing import max_error, rms_error

pytest.importorskip("triton")

from dorac.kernels import configs, segments

GATES = {
    "mixtral": Gate(),
    "gpt_oss": Gate("silu", interleaved=True, limit=7.0, alpha=1.702, shift=1.0),
    "limited": Gate("silu", limit=0.75),
    "halved": Gate("silu", alpha=0.0),
    "gelu": Gate("gelu", interleaved=True),
    "gelu_tanh": Gate("gelu_tanh", shift=-0.5),
    "relu": Gate("relu", interleaved=True, limit=0.5),
}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def textbook(gate, y):
    return reference.gated(y, **dataclasses.asdict(gate))


def test_bad_gates():
    with pytest.raises(ValueError, match=r"activation must be one of 'silu', .* got 'tanh'"):
        Gate("tanh")
    with pytest.raises(ValueError, match=r"alpha is silu's, got 1.702 with 'gelu'"):
        Gate("gelu", alpha=1.702)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="limit must be positive or None"):
            Gate(limit=limit)
    with pytest.raises(ValueError, match="even number of outputs, got 5"):
        Gate()(torch.randn(2, 5))
    for name in ("limit", "alpha", "shift"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got Tensor"):
            Gate(**{name: torch.tensor(2.0)})

    class Doubled(Gate):
        def __call__(self, y):
            return 2 * super().__call__(y)

    layer, tensors = drawn(ENDS, 0, (16, 8, 4), HALF, HALF, "cpu")
    for gate, kind in (("silu", "str"), (Doubled(), "Doubled")):
        with pytest.raises(TypeError, match=f"gate must be a Gate, got {kind}"):
            layer.function(*tensors, scaling=SCALING, gate=gate)


@gates
@pytest.mark.parametrize("dtype", [torch.float64, WIDE, HALF])
def test_in_aten(gate, dtype):
    """The value and its gradient; a tensor on a limit has that of within."""
    y = torch.randn(9, 12, dtype=torch.float64).to(dtype).requires_grad_()
    exact = y.detach().double().requires_grad_()
    z, truth = gate(y), textbook(gate, exact)
    dz = torch.randn_like(z)
    found, wanted = torch.autograd.grad(z, y, dz)[0], torch.autograd.grad(truth, exact, dz.double())[0]
    assert z.dtype is found.dtype is dtype
    for actual, expected in ((z, truth), (found, wanted)):
        assert max_error(actual, expected) <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    if gate.limit is not None:
        on = torch.full((1, 2), gate.limit, dtype=torch.float64, requires_grad=True)
        assert (torch.autograd.grad(gate(on).sum(), on)[0] != 0).all()


# Ends of the segments' rows, how many rows there are; out, in and rank.
CASES = {
    "one of many": ([0, 0, 20, 20], 20, (34, 24, 16)),
    "a tail": ([3, 3, 5, 6], 9, (18, 24, 5)),
    "many rows": ([70, 75, 200], 200, (260, 40, 24)),
    "one row": ([1], 1, (2, 9, 1)),
    "even": ([32, 64], 64, (256, 128, 16)),
    "large rank": ([5, 20], 20, (24, 16, 70)),
    "a tail alone": ([0, 0], 7, (16, 16, 4)),
}
SAMPLED = {
    ("one of many", "mixtral", WIDE),
    ("a tail", "gpt_oss", HALF),
    ("one row", "limited", HALF),
    ("many rows", "gelu", HALF),
    ("large rank", "mixtral", HALF),
    ("large rank", "gpt_oss", WIDE),
    ("a tail alone", "relu", WIDE),
    ("even", "gelu_tanh", HALF),
}
cases = pytest.mark.parametrize(
    ("case", "name", "factor_dtype"),
    [
        pytest.param(*key, marks=() if key in SAMPLED else pytest.mark.full, id=" ".join(map(str, key)))
        for key in ((case, name, dtype) for case in CASES for name in GATES for dtype in (HALF, WIDE))
    ],
)


def forward(i, gate, scaling, bias, *, want_inner=True, config=None):
    """z and inner, which takes the place of a copy of base."""
    base, layer = i.base.clone(), (i.h, i.lora_B, i.magnitude, i.norm, scaling, bias, i.offsets)
    z = segments.segment_gate(base, *layer, dataclasses.astuple(gate), want_inner=want_inner, config=config)
    assert want_inner or torch.equal(base, i.base)
    return z, base


def backward(i, gate, dz, inner, scaling, bias, **options):
    """d_base and the gradients of magnitude, lora_B and bias."""
    layer = inner, i.magnitude, i.norm, bias, i.h, scaling, i.offsets, i.lora_B
    return segments.segment_gate_backward(dz, *layer, dataclasses.astuple(gate), **options)


@cases
def test_kernels(case, name, factor_dtype, device):
    """Forward, and backward of what it kept; a row of zero norm, whose g is 1 and whose magnitude has no gradient."""
    ends, rows, sizes = CASES[case]
    gate, number = GATES[name], [*CASES].index(case)
    i = Inputs(ends, rows, sizes, HALF, factor_dtype, device)
    if sizes[0] > 2:
        i.norm[0, 1] = 0
    scaling = (0.7, torch.full((), 0.7, device=device), torch.rand(len(ends), device=device) + 0.5)[number % 3]
    bias = i.bias if number % 2 else None
    strips = configs.GateBackwardConfig(16, 16, 32, 4, 2, 16) if number % 2 else None
    z, inner = forward(i, gate, scaling, bias)
    assert torch.equal(forward(i, gate, scaling, bias, want_inner=False)[0], z)
    dz = torch.randn_like(z)
    found = backward(i, gate, dz, inner, scaling, bias, bias_dtype=WIDE if number % 2 else None, config=strips)

    exact, y = torch.zeros_like(inner, dtype=torch.float64), torch.zeros_like(inner, dtype=torch.float64)
    g = (i.magnitude / i.norm).where(i.norm > 0, 1.0).double()
    for e, r in i.rows():
        exact[r] = i.base[r].double() + s_of(scaling, e) * i.h[r].double() @ i.lora_B[e].double().T
        y[r] = g[e] * inner[r].double() + (0 if bias is None else bias[e].double())
    check(inner, exact, False, "inner", HALF)
    y.requires_grad_()
    truth = textbook(gate, y)
    assert (z[i.ends[-1] :] == 0).all()
    check(z[: i.ends[-1]], truth[: i.ends[-1]], False, "z", HALF)
    dy = torch.autograd.grad(truth, y, dz.double())[0]
    d_base, d_m, d_bias = torch.zeros_like(dy), torch.zeros_like(g), torch.zeros_like(g)
    d_b = torch.zeros_like(i.lora_B, dtype=torch.float64)
    for e, r in i.rows():
        d_base[r], d_bias[e] = g[e] * dy[r], dy[r].sum(0)
        d_m[e] = ((dy[r] * inner[r].double()).sum(0) / i.norm[e].double()).where(i.norm[e] > 0, 0.0)
        d_b[e] = s_of(scaling, e) * found[0][r].double().T @ i.h[r].double()  # of d_base as it was rounded
    check(found[0], d_base, False, "d_base", HALF)
    near = 2**-18  # float32: an activation's slope is 16 roundings of it, of terms that cancel
    assert max_error(found[1], d_m) <= near * d_m.abs().max()
    check(found[2], d_b, factor_dtype is WIDE, "d_b", HALF)
    if found[3] is not None:
        assert max_error(found[3], d_bias) <= near * d_bias.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_kernels_repeat_bitwise_in_any_tiles(name, device):
    """z and d_base are the same whatever the tiles; sums are from one run to the next."""
    gate = GATES[name]
    i = Inputs([0, 90, 97], 99, (64, 16, 20), HALF, WIDE, device)
    forms = configs.GateConfig(16, 16, 16, 4, 2), configs.GateConfig(16, 32, 32, 4, 2, rows=64)
    (z, inner), (other, again) = (forward(i, gate, 0.7, i.bias, config=config) for config in forms)
    assert max_error(other, z) <= 2 * torch.finfo(HALF).eps * z.abs().max()  # ranks in another number of steps
    assert torch.equal(forward(i, gate, 0.7, i.bias, config=forms[0])[0], z)
    assert again.isfinite().all()
    dz = torch.randn_like(z)
    strips = configs.GateBackwardConfig(16, 16, 32, 4, 2, 16), configs.GateBackwardConfig(32, 32, 96, 4, 2, 32)
    first, second, third = (
        backward(i, gate, dz, inner, 0.7, i.bias, bias_dtype=HALF, config=strips[n]) for n in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], third[0])


@pytest.mark.parametrize("ends", [[5, 3, 9], [-4, 20, 30], [0, 0, 0]])
def test_wrong_offsets_stay_within_bounds(ends, device):
    i = Inputs([3, 5, 9], 9, (16, 16, 4), HALF, HALF, device)
    i.offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    z, inner = forward(i, GATES["gpt_oss"], 0.7, i.bias)
    assert z.shape == (9, 8)
    backward(i, GATES["gpt_oss"], torch.randn_like(z), inner, 0.7, i.bias, bias_dtype=HALF)


def test_numbers_that_are_not_finite(device):
    """NaN stays NaN behind a limit, and infinity is limited, as in aten."""
    gate = GATES["gpt_oss"]
    i = Inputs([4], 4, (16, 16, 4), HALF, HALF, device)
    i.base[0, 0], i.base[1, 1], i.base[2, 2], i.base[3, 3] = float("nan"), float("nan"), float("inf"), -float("inf")
    z, inner = forward(i, gate, 0.7, i.bias)
    y = ((i.magnitude / i.norm) * inner.float() + i.bias.float()).requires_grad_()
    expected = gate(y)
    torch.testing.assert_close(z, expected.to(HALF), equal_nan=True, rtol=0.02, atol=0.02)
    assert z.isnan().sum() == 2
    dz = torch.randn_like(z)
    d_base = backward(i, gate, dz, inner, 0.7, i.bias)[0]
    truth = torch.autograd.grad(expected, y, dz.float())[0] * (i.magnitude / i.norm)
    torch.testing.assert_close(d_base, truth.to(HALF), equal_nan=True, rtol=0.02, atol=0.02)


# ---- The layer of experts over these kernels. ----


def run(layer, tensors, gate, norm, dz=None, fused=True):
    """z and the gradients; not fused: the gate in aten behind the layer."""
    trained = [t for t in tensors if t is not None and t.requires_grad]
    options = {"scaling": SCALING, "weight_norm": norm}
    z = layer.function(*tensors, gate=gate, **options) if fused else gate(layer.function(*tensors, **options))
    dz = torch.randn_like(z) if dz is None else dz
    return dz, [z, *torch.autograd.grad(z, trained, dz)]


def check_beside(found, beside, exact, slack=1.0):
    """Each result at most as far from float64's as the other is.

    inner is rounded once more than without a gate, by half an eps, and z has that up to 1 + |gate| times. In the mean
    of many elements there is room for it; of few, each error is one draw: ``slack``.
    """
    for actual, other, truth in zip(found, beside, exact, strict=True):
        assert actual.dtype is other.dtype
        assert actual.shape == truth.shape
        size = truth.square().mean().sqrt().item()
        bound = 1.25 * rms_error(other, truth) + torch.finfo(HALF).eps * size / 2
        assert rms_error(actual, truth) <= slack * bound


def check_layer(layer, tensors, gate, slack=1.0):
    """Every result at most as far from float64's textbook as that of the layer with the gate behind it."""
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    dz, found = run(layer, tensors, gate, norm)
    _, beside = run(layer, tensors, gate, norm, dz, fused=False)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    z = textbook(gate, layer.textbook(*exact, weight_norm=norm.double()))
    leaves = [t for t in exact if t is not None and t.requires_grad]
    check_beside(found, beside, [z, *torch.autograd.grad(z, leaves, dz.double())], slack)


@pytest.mark.parametrize("factor_dtype", [HALF, WIDE])
@pytest.mark.parametrize(
    ("name", "sizes", "bias"),
    [
        ("mixtral", (32, 8, 16), None),
        ("gpt_oss", (48, 16, 5), "frozen"),
        ("gelu_tanh", (24, 16, 4), "trained"),
        pytest.param("gpt_oss", (272, 40, 100), "trained", marks=pytest.mark.full),
    ],
)
def test_eager_values_and_gradients(name, sizes, bias, factor_dtype, path, device):  # noqa: F811
    layer, tensors = drawn(
        ENDS, 3, sizes, HALF, factor_dtype, device, bias=bias is not None, transposed=name == "gpt_oss"
    )
    if bias == "frozen":
        tensors[5].requires_grad_(False)
    with torch.no_grad():
        tensors[1][:, 2], tensors[3][:, 2] = 0, 0  # a row of zero norm
    check_layer(layer, tensors, GATES[name])
    assert path == ["training"] * 2


def test_eager_inference_and_a_norm_that_is_not_given(path, device):  # noqa: F811
    layer, tensors = drawn(ENDS, 3, (32, 16, 4), HALF, HALF, device)
    gate = GATES["gpt_oss"]
    expected = layer.function(*tensors, scaling=SCALING, gate=gate)
    with torch.no_grad():
        z = layer.function(*tensors, scaling=SCALING, gate=gate)
    assert path == ["training", "inference"]
    assert z.shape == (ENDS[-1] + 3, 16)
    assert torch.equal(z, expected)
    assert z._base is None


def test_any_cotangent(path, device):  # noqa: F811
    """Of strides of its own, or one number for all."""
    layer, tensors = drawn(ENDS, 3, (32, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    for dz in (torch.randn(16, ENDS[-1] + 3, device=device).to(HALF).T, torch.ones((), device=device, dtype=HALF)):
        dz = dz.expand(ENDS[-1] + 3, 16)
        _, found = run(layer, tensors, GATES["mixtral"], norm, dz)
        _, expected = run(layer, tensors, GATES["mixtral"], norm, dz.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert path == ["training"] * 4


@pytest.mark.parametrize("gate", [None, GATES["gpt_oss"]])
@pytest.mark.parametrize("magnitude", ["trained", "frozen"])
def test_strided_offsets_and_scalings(gate, magnitude, path, device):  # noqa: F811
    """After a call with contiguous ones, whose plan is not theirs; a frozen magnitude has the ops."""
    _, tensors = drawn(ENDS, 3, (32, 16, 4), HALF, HALF, device)
    tensors[4].requires_grad_(magnitude == "trained")
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    leaves = [t for t in tensors if t is not None and t.requires_grad]

    def results(offsets, scaling):
        of_layer = {"offsets": offsets, "scaling": scaling, "weight_norm": norm, "gate": gate}
        z = functional.dora_linear_grouped(*tensors, **of_layer)
        return [z, *torch.autograd.grad(z.square().sum(), leaves)]

    def strided(t):
        return torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0]

    offsets, scalings = torch.tensor(ENDS, device=device), torch.tensor([0.5, 1.0, 2.0], device=device)
    same = torch.full((3,), 0.5, device=device)
    expected, of_same = results(offsets, scalings), results(offsets, same)
    assert path == (["training"] * 2 if magnitude == "trained" else [])
    for found, wanted in (
        (results(strided(offsets), scalings), expected),
        (results(offsets, strided(scalings)), expected),
        (results(offsets, same[:1].expand(3)), of_same),
    ):
        for actual, other in zip(found, wanted, strict=True):
            assert max_error(actual, other) <= 0.05 * other.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_is_kept(name, path, device):  # noqa: F811
    """inner, and nothing else as wide as the projection; z is whoever's takes it."""
    layer, tensors = drawn(ENDS, 3, (32, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer.function(*tensors, scaling=SCALING, weight_norm=norm, gate=GATES[name])
    assert path == ["training"]
    rows = [tuple(t.shape) for t in kept if t.ndim == 2 and len(t) == ENDS[-1] + 3]
    assert sorted(rows) == [(ENDS[-1] + 3, 4), (ENDS[-1] + 3, 16), (ENDS[-1] + 3, 32)]  # h, x and inner


def test_differentiated_again(path, device):  # noqa: F811
    layer, tensors = drawn(ENDS, 3, (16, 8, 4), HALF, WIDE, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)

    def second(*tensors):
        leaves = [t for t in tensors if t.requires_grad]
        z = layer.function(*tensors, scaling=SCALING, weight_norm=norm.to(tensors[4].dtype), gate=GATES["gpt_oss"])
        first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = second(*tensors)
    assert path == ["training"]
    exact = second(*(t.detach().double().requires_grad_(t.requires_grad) for t in tensors))
    for actual, truth in zip(found, exact, strict=True):
        assert max_error(actual, truth) <= 0.05 * truth.abs().max()


@pytest.mark.parametrize("where", ["forward", "again", "both"])
def test_a_mode_over_a_part_of_a_checkpoint(where, path, device):  # noqa: F811
    """Which sees ops in one of both runs, or in both: the same tensors are saved."""
    layer, tensors = drawn(ENDS, 3, (32, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    leaves = [t for t in tensors if t.requires_grad]

    def of(*tensors):
        return layer.function(*tensors, scaling=SCALING, weight_norm=norm, gate=GATES["gpt_oss"])

    expected = torch.autograd.grad(of(*tensors).sum(), leaves)
    counter = FlopCounterMode(display=False)
    modes = {"forward": [0], "again": [1], "both": [0, 1]}[where]
    seen = [counter if n in modes else torch.enable_grad() for n in range(2)]
    with seen[0]:
        z = checkpoint(of, *tensors, use_reentrant=False)
    with seen[1]:
        found = torch.autograd.grad(z.sum(), leaves)
    assert counter.get_total_flops() > 0
    for a, b in zip(found, expected, strict=True):
        assert rms_error(a, b) <= 2 * torch.finfo(HALF).eps * b.double().square().mean().sqrt()


def test_steps_aside(path, device):  # noqa: F811
    """Then the gate is aten's, behind whatever computes the layer."""
    layer, tensors = drawn(ENDS, 0, (32, 16, 4), HALF, HALF, device)
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    gate, options = GATES["gpt_oss"], {"scaling": SCALING, "weight_norm": norm}
    x, *others = tensors

    def behind(y):
        return lambda x: y(x, gate=gate), lambda x: gate(y(x))

    for fused, separate in (
        behind(lambda x, **of: layer.function(x.float(), *(t.float() for t in others), **options, **of)),
        behind(lambda x, **of: vmap(lambda x: layer.function(x, *others, **options, **of))(x[None])),
        behind(lambda x, **of: layer.function(x, *others, **options, **of, dropout_p=0.5, dropout_on="low_rank")),
    ):
        results = []
        for function in (fused, separate):
            torch.manual_seed(0)
            results.append(function(x))
        assert torch.equal(*results)
    assert not path
    with torch.autocast(device, dtype=HALF):
        assert torch.equal(layer.function(*tensors, gate=gate, **options), gate(layer.function(*tensors, **options)))
    assert not path


@gates
@pytest.mark.parametrize("dtype", [WIDE, torch.float64])
def test_on_the_cpu(gate, dtype):
    """Behind the layer that goes over slices."""
    layer, tensors = drawn(ENDS, 3, (16, 12, 4), dtype, dtype, "cpu")
    norm = reference.row_norm(*(t.detach() for t in tensors[1:4]), SCALING)
    dz, found = run(layer, tensors, gate, norm)
    _, beside = run(layer, tensors, gate, norm, dz, fused=False)
    assert all(torch.equal(a, b) for a, b in zip(found, beside, strict=True))
    z = textbook(gate, layer.textbook(*tensors, weight_norm=norm))
    torch.testing.assert_close(found[0], z)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compiled(name):
    """In one graph, compiled once."""
    layer, tensors = drawn(ENDS, 3, (16, 8, 4), torch.float64, torch.float64, "cpu")
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    gate = GATES[name]

    def function(*tensors):
        return layer.function(*tensors, scaling=SCALING, weight_norm=norm, gate=gate)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    found, expected = (
        (z, *torch.autograd.grad(z.sin().sum(), leaves)) for z in (compiled(*tensors), function(*tensors))
    )
    torch.testing.assert_close(found, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*tensors)


@pytest.mark.usefixtures("path")
@settings(max_examples=6, derandomize=True, database=None, **COMMON)
@given(routing=routings([(HALF, HALF), (HALF, WIDE)]))
def test_random_routings(routing):
    check_routing(routing)


def check_routing(routing):
    counts, tail, (out, length, rank), of_dtypes, seed = routing
    if not sum(counts) + tail:
        return
    ends = torch.tensor(counts).cumsum(0).tolist()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = 2 * out, length, rank
    layer, tensors = drawn(ends, tail, sizes, *of_dtypes, device, seed=seed)
    check_layer(layer, tensors, [*GATES.values()][seed % 2], slack=4.0)


@pytest.mark.full
@pytest.mark.usefixtures("path", "quick_interpreter")
@settings(max_examples=200, **COMMON)
@given(routing=routings([(HALF, HALF), (HALF, WIDE)]))
def test_two_hundred_routings(routing):
    check_routing(routing)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_modules_take_the_path(family, path, device, monkeypatch):  # noqa: F811
    """Both projections, the first with its gate; as far from float64 as with the module's own gate."""
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments, dense_forward

    layer = adapted(family, HALF).to(device)
    args = [t.to(device) for t in arguments(family, dtype=HALF)]
    seen, grouped = [], eager_grouped.dora_linear_grouped
    monkeypatch.setattr(eager_grouped, "dora_linear_grouped", lambda *t: (seen.append(t[9]), grouped(*t))[1])

    def results(forward=layer):
        y = forward(*args)
        return [y, *torch.autograd.grad(y.square().sum(), [*layer.parameters(recurse=False)])]

    fused = results()
    gate = Gate() if family == "mixtral" else Gate("silu", True, layer.base_layer.limit, layer.base_layer.alpha, 1.0)
    assert seen == [gate, None]
    assert path == ["training"] * 2
    # A gate of its own is what it says it is.
    layer.base_layer._apply_gate = type(layer.base_layer)._apply_gate.__get__(layer.base_layer)
    truth = results(lambda *args: dense_forward(layer, args, torch.float64))
    check_beside(fused, results(), [t.double() for t in truth])
    assert seen[2:] == [None, None]


def test_modules_with_other_gates(path, device):  # noqa: F811
    """Another activation, or one with a hook: the module's own forward."""
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments

    layer = adapted("mixtral", HALF).to(device)
    args = [t.to(device) for t in arguments("mixtral", dtype=HALF)]
    hidden = args[0]
    assert layer._gate(hidden) == Gate()
    handle = layer.base_layer.act_fn.register_forward_hook(lambda module, args, y: 2 * y)
    assert layer._gate(hidden) is None
    doubled = layer(*args)
    handle.remove()
    torch.testing.assert_close(doubled, 2 * layer(*args), rtol=0.05, atol=0.05)
    layer.base_layer.act_fn = torch.nn.GELU(approximate="tanh")
    assert layer._gate(hidden) == Gate("gelu_tanh")
    layer.base_layer.act_fn = torch.nn.Tanh()
    assert layer._gate(hidden) is None
    del layer.base_layer.act_fn
    layer.base_layer.act_fn = torch.nn.functional.silu  # as some classes have it
    assert layer._gate(hidden) is None
    copy.deepcopy(layer)(*args)
    layer.merge()
    assert layer._gate(hidden) is None
    assert path


class Swish(torch.nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def test_activations_that_change(path, device, monkeypatch):  # noqa: F811
    """What the kernels compute is what the module computes now, not what it did in its first call."""
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments
    from transformers.activations import ACT2FN

    layer = adapted("mixtral", HALF).to(device)
    base, hidden = layer.base_layer, arguments("mixtral", dtype=HALF)[0].to(device)

    def gate(act=None):
        base.act_fn = act or base.act_fn
        return layer._gate(hidden)

    assert gate(ACT2FN["gelu_pytorch_tanh"]) == Gate("gelu_tanh")
    assert gate(ACT2FN["gelu_10"]) is None  # clipped further out than an activation bends
    assert gate(Swish()) == Gate()
    base.act_fn.beta = 1.702
    assert gate() is None
    base.act_fn.beta = 1.0
    assert gate() == Gate()
    assert gate(Swish(torch.nn.Parameter(torch.ones(())))) is None  # whose gradient would be lost
    for beta in (torch.ones(()), [1.0]):  # written to in place
        assert gate(Swish(beta)) is None
    assert gate(torch.nn.Sequential(torch.nn.SiLU())) is None  # whose child may be another, or get a hook
    assert gate(torch.nn.SiLU()) == Gate()
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.SiLU, "forward", lambda self, x: 2 * x)
        assert gate() is None
    assert gate() == Gate()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gates_that_are_put_in_the_place_of_the_stock_one(family, path, device, monkeypatch):  # noqa: F811
    """On the class, and with it where it comes from."""
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments
    from transformers.integrations import moe

    layer = adapted(family, HALF).to(device)
    args = [t.to(device) for t in arguments(family, dtype=HALF)]
    layer.base_layer.down_proj_bias = None
    expected = layer(*args)
    assert layer._gate(args[0]) is not None
    stock = type(layer.base_layer)._apply_gate
    replaced = functools.wraps(stock)(lambda self, y: 2 * stock(self, y))
    monkeypatch.setattr(type(layer.base_layer), "_apply_gate", replaced)
    monkeypatch.setattr(moe, "_default_apply_gate", replaced)
    assert layer._gate(args[0]) is None
    torch.testing.assert_close(layer(*args), 2 * expected, rtol=0.05, atol=0.05)


def test_numbers_of_a_gate_that_change(path, device):  # noqa: F811
    pytest.importorskip("transformers")
    from test_experts_module import adapted, arguments

    layer = adapted("gpt_oss", HALF).to(device)
    base, args = layer.base_layer, [t.to(device) for t in arguments("gpt_oss", dtype=HALF)]
    for alpha, limit in ((1.702, 7.0), (3.0, 0.5), (1, 2)):
        base.alpha, base.limit = alpha, limit
        assert layer._gate(args[0]) == Gate("silu", True, limit, alpha, 1.0)
    expected = layer(*args)
    assert path == ["training"] * 2
    base.alpha = torch.ones((), device=device, requires_grad=True)
    assert layer._gate(args[0]) is None
    y = layer(*args)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(y.sum(), base.alpha)[0] != 0


@pytest.mark.gpu
@pytest.mark.parametrize("factor_dtype", [HALF, WIDE])
@pytest.mark.parametrize(("name", "sizes"), [("mixtral", (48, 32, 16)), ("gpt_oss", (272, 40, 5))])
def test_a_graph_replays_other_offsets(name, sizes, factor_dtype):
    """And neither a capture nor a step waits for the device."""
    _, tensors = drawn([30, 30, 70], 30, sizes, HALF, factor_dtype, "cuda")
    norm = functional.norm_factored(*(t.detach() for t in tensors[1:4]), SCALING)
    offsets = torch.tensor([30, 30, 70], dtype=torch.int32, device="cuda")
    leaves = [t for t in tensors if t.requires_grad]

    def step():
        options = {"offsets": offsets, "scaling": SCALING, "weight_norm": norm, "gate": GATES[name]}
        z = functional.dora_linear_grouped(*tensors, **options)
        return z, *torch.autograd.grad(z, leaves, torch.ones_like(z))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for ends in ([0, 100, 100], [1, 2, 99], [33, 66, 90], [0, 0, 0]):
        offsets.copy_(torch.tensor(ends))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(static, step(), strict=True))
