"""Blocks as functions: ``dora_linears`` and ``dora_mlp`` against textbooks, over every option that they have."""

import functools
import math

import blocks
import packed_weights
import pytest
import torch
import torch.nn.functional as F
from blocks import activation, check, cotangents, first_in_ci, leaves, projection, projections, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dorac import functional, reference
from dorac.functional import Projection
from dorac.ops import packed_product
from dorac.testing import assert_rms_beside, linear_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
KINDS = ("dora", "lora", "plain")


def masks(x: Tensor, layers, seed: int = 3) -> dict[float, Tensor]:
    """What dropout multiplies x with, by probability."""
    torch.manual_seed(seed)
    chosen = dict.fromkeys(p.dropout_p for p in layers if p.lora_A is not None and p.dropout_p)
    return {p: (F.dropout(torch.ones_like(x), p) > 0).double() / (1 - p) for p in chosen}


@st.composite
def layers_of(draw, dtype: torch.dtype, out: int, inputs: int) -> Projection:
    """A layer of any kind, with any of the options."""
    kind, rank = draw(st.sampled_from(KINDS)), draw(st.integers(1, 10))
    factor_dtype = draw(st.sampled_from([dtype, *DTYPES]))
    drawn = linear_inputs((1, out, inputs, rank), dtype=torch.float64, seed=draw(st.integers(0, 2**16)))
    _, weight, a, b, magnitude, bias = drawn.tensors()
    if out and draw(st.booleans()):  # a zero row
        weight[0], b[0] = 0, 0
    scaling = round(draw(st.floats(-4, 4)), 3)
    if draw(st.booleans()):
        scaling = torch.tensor(scaling, dtype=draw(st.sampled_from(DTYPES)))
    tensors = {"weight": weight.to(dtype), "bias": bias.to(dtype) if draw(st.booleans()) else None}
    if kind != "plain":
        tensors |= {"lora_A": a.to(factor_dtype), "lora_B": b.to(factor_dtype)}
    if kind == "dora":
        tensors["magnitude"] = magnitude.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    for name, t in tensors.items():
        tensors[name] = None if t is None else t.requires_grad_(draw(st.booleans()))
    p = Projection(
        **tensors,
        scaling=scaling,
        dropout_p=draw(st.sampled_from([0, 0.0, 0.0, 0.3, 0.6])),
        save_output=draw(st.booleans()),
    )
    if kind == "dora" and draw(st.booleans()):
        wide = (t.detach().double() for t in p[:3])
        norm = reference.row_norm(*wide, float(scaling))
        p = p._replace(weight_norm=norm.to(torch.promote_types(dtype, torch.float32)))
    return p


LEADING = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def activations(draw, dtype: torch.dtype, inputs: int) -> Tensor:
    leading = draw(LEADING)
    x = linear_inputs((math.prod(leading), 1, inputs, 1), seed=draw(st.integers(0, 2**16))).x
    x = x.to(dtype).reshape(*leading, inputs)
    x = x.mT.contiguous().mT if x.ndim > 1 and draw(st.booleans()) else x
    return x.requires_grad_(draw(st.booleans()))


@st.composite
def linears(draw) -> tuple[Tensor, list[Projection], str]:
    dtype, inputs = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 24))
    x = draw(activations(dtype, inputs))
    layers = [draw(layers_of(dtype, draw(st.integers(0, 24)), inputs)) for _ in range(draw(st.integers(1, 4)))]
    return x, layers, draw(st.sampled_from(["adapter", "low_rank"]))


def check_linears(case) -> None:
    x, layers, meaning = case
    dropped = masks(x, layers)
    torch.manual_seed(3)
    ys, grads = run(x, layers, dropout_on=meaning)
    for y, p in zip(ys, layers, strict=True):
        assert y.shape == (*x.shape[:-1], len(p.weight))
        assert y.dtype is x.dtype
        assert y.requires_grad == any(t is not None and t.requires_grad for t in (x, *p[:6]))
    dys = [dy if y.requires_grad else None for y, dy in zip(ys, cotangents(ys), strict=True)]
    options = {"dropped": dropped, "dropout_on": meaning, "casts": 6 if dropped else 0}
    used = [i for i, dy in enumerate(dys) if dy is not None]
    check(x, layers, ys, grads, dys, **options)
    assert used or all(grad is None for grad in grads.values())


@st.composite
def mlps(draw) -> tuple:
    dtype, inputs, inner = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 24)), draw(st.integers(1, 24))
    x = draw(activations(dtype, inputs))
    gate, up = (draw(layers_of(dtype, inner, inputs)) for _ in range(2))
    down = draw(layers_of(dtype, draw(st.integers(0, 24)), inner))
    return (
        x,
        gate if draw(st.booleans()) else None,
        up,
        down,
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(["adapter", "low_rank"])),
    )


def run_mlp(x, gate, up, down, act, meaning="adapter", autocast=None):
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = functional.dora_mlp(x, gate, up, down, activation=act, dropout_on=meaning)
    dy = cotangents([y])[0]
    if y.requires_grad:
        y.backward(dy)
    return y, dy


def check_mlp(case) -> None:
    x, gate, up, down, act, meaning = case
    named = {name: p for name, p in (("gate", gate), ("up", up), ("down", down)) if p is not None}
    dropped = masks(x, [p for p in (gate, up) if p is not None])
    state = torch.get_rng_state()  # down's mask is drawn next
    of_inner = {}
    if down.lora_A is not None and down.dropout_p:
        ones = torch.ones(*x.shape[:-1], len(up.weight), dtype=x.dtype)
        of_inner = {down.dropout_p: (F.dropout(ones, down.dropout_p) > 0).double() / (1 - down.dropout_p)}
    assert torch.is_tensor(state)
    torch.manual_seed(3)
    y, dy = run_mlp(*case)
    assert y.shape == (*x.shape[:-1], len(down.weight))
    assert y.dtype is x.dtype
    options = {"dropout_on": meaning, "dropped": dropped, "dropped_inner": of_inner}
    budgets = blocks.mlp_budgets(x, gate, up, down, dy, act, casts=6 if dropped or of_inner else 0, **options)
    budgets["y"].check(y, "y")
    tensors = {"x": x} | {f"{n} {k}": getattr(p, k) for n, p in named.items() for k in blocks.NAMES}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            assert tensor.grad.dtype is tensor.dtype, name
            budgets[name].check(tensor.grad, name)
        elif tensor is not None:
            assert tensor.grad is None, name


CASES = {"dora_linears": (linears, check_linears), "dora_mlp": (mlps, check_mlp)}
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.mark.parametrize("function", CASES)
@settings(max_examples=40, derandomize=True, database=None, **COMMON)
@given(data=st.data())
def test_equals_the_textbook(function, data):
    cases, check_case = CASES[function]
    check_case(data.draw(cases()))


@pytest.mark.full
@pytest.mark.parametrize("function", CASES)
@settings(max_examples=2000, **COMMON)
@given(data=st.data())
def test_two_thousand_cases(function, data):
    cases, check_case = CASES[function]
    check_case(data.draw(cases()))


@pytest.mark.parametrize("function", CASES)
@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_the_dense_textbook(function, use_compile, dtype):
    """In the same dtype, over tensors that are large enough for roundings to average out."""
    x = activation(dtype)
    if function == "dora_linears":
        layers = projections(*KINDS, dtype=dtype)
        call = lambda x: functional.dora_linears(x, layers)  # noqa: E731
    else:
        layers = [projection(kind, 64, 8, dtype=dtype, seed=i) for i, kind in enumerate(("dora", "lora"))]
        layers.append(projection("dora", 48, 8, inputs=64, dtype=dtype))
        call = lambda x: (functional.dora_mlp(x, *layers),)  # noqa: E731

    def textbook(dtype, dys):
        of = [[t if t is None else t.detach().to(dtype).requires_grad_() for t in p[:5]] for p in layers]
        start = x.detach().to(dtype).requires_grad_()
        named = [(tuple(t), {"scaling": p.scaling}) for t, p in zip(of, layers, strict=True)]
        if function == "dora_linears":
            ys = reference.dora_linears(start, named)
        else:
            ys = (reference.dora_mlp(start, *named, "silu"),)
        torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
        names = ["x", *(f"{i} {n}" for i in range(3) for n in blocks.NAMES)]
        grads = zip(names, (start, *(t for tensors in of for t in tensors)), strict=True)
        return ys, {name: t.grad for name, t in grads if t is not None}

    ys = (torch.compile(call, fullgraph=True, backend="aot_eager") if use_compile else call)(x)
    dys = cotangents(ys)
    torch.autograd.backward(ys, dys)
    (truths, exact), (denses, dense) = textbook(torch.float64, dys), textbook(dtype, dys)
    for y, truth, other in zip(ys, truths, denses, strict=True):
        near(y, truth, other)
    for name, tensor in leaves(x, layers).items():
        if tensor.requires_grad:
            near(tensor.grad, exact[name], dense[name], name)


def near(actual, truth, dense, name="y"):
    if actual.dtype is torch.float64:
        torch.testing.assert_close(actual, truth, msg=name)
    elif actual.numel() >= 64:
        assert_rms_beside(actual, dense, truth, label=name)


def good() -> Projection:
    return projection("dora", 5, 3, inputs=6, dtype=torch.float32)


def changed(**fields) -> Projection:
    return good()._replace(**fields)


BAD = {
    "not a projection": (tuple(good()), TypeError, "must be a Projection, got tuple"),
    "nothing": (None, TypeError, "must be a Projection, got NoneType"),
    "weight": (changed(weight=[[1.0]]), TypeError, "weight must be a tensor, got list"),
    "weight, integer": (changed(weight=torch.ones(5, 6).char()), TypeError, "weight must be .*got torch.int8"),
    "weight, experts": (changed(weight=torch.ones(2, 5, 6)), ValueError, r"weight must be \[out, in\], got shape"),
    "features": (
        changed(weight=torch.ones(5, 7), lora_A=None, lora_B=None, magnitude=None, weight_norm=None),
        ValueError,
        r"x must be \[\*, in\] with in = 7, got shape \[4, 6\]",
    ),
    "dtype": (changed(weight=torch.ones(5, 6).double()), TypeError, "x must have the dtype of weight, torch.float64"),
    "half of a pair": (changed(lora_B=None), ValueError, "lora_A and lora_B come together, got lora_A alone"),
    "other half": (changed(lora_A=None), ValueError, "lora_A and lora_B come together, got lora_B alone"),
    "lora_A": (changed(lora_A=torch.ones(3, 5)), ValueError, r"lora_A must be \[r, in\] = \[3, 6\] .*got \[3, 5\]"),
    "lora_B": (changed(lora_B=torch.ones(5, 2)), ValueError, r"lora_B must be \[out, r\] = \[5, 3\] .*got \[5, 2\]"),
    "rank 0": (changed(lora_A=torch.ones(0, 6)), ValueError, "lora_A must have a rank of at least 1"),
    "factors' dtypes": (changed(lora_B=torch.ones(5, 3).half()), TypeError, "lora_A and lora_B must share a dtype"),
    "magnitude alone": (changed(lora_A=None, lora_B=None), ValueError, "magnitude needs lora_A and lora_B, got None"),
    "norm alone": (changed(magnitude=None), ValueError, "weight_norm needs a magnitude, got None"),
    "magnitude": (changed(magnitude=torch.ones(6)), ValueError, r"magnitude must be \[out\] = \[5\], got shape \[6\]"),
    "bias": (changed(bias=torch.ones(4)), ValueError, r"bias must be \[out\] = \[5\], got shape \[4\]"),
    "norm": (changed(weight_norm=torch.ones(4)), ValueError, r"weight_norm must be \[out\] = \[5\], got shape \[4\]"),
    "device": (changed(lora_B=torch.ones(5, 3, device="meta")), ValueError, "lora_B must be on cpu like weight"),
    "scaling": (changed(scaling=float("nan")), ValueError, "scaling must be finite in float32, got nan"),
    "scaling, string": (changed(scaling="2"), TypeError, "scaling must be a number or a 0-d float tensor, got str"),
    "dropout": (changed(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout, none": (changed(dropout_p=None), TypeError, "dropout_p must be a number, got NoneType"),
}


def refuse(call, error, message, how):
    """In eager and compiled; where a graph break is no way out, the sentence is in Dynamo's own error."""
    if how == "eager":
        with pytest.raises(error, match=message):
            call()
        return
    error = torch._dynamo.exc.TorchDynamoException if how == "fullgraph" else error
    with pytest.raises(error, match=message):
        torch.compile(call, backend="eager", fullgraph=how == "fullgraph")()


HOW = ["eager", "fullgraph", pytest.param("compiled", marks=pytest.mark.full)]


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", HOW)
def test_bad_input_is_named(case, how):
    """The function, and which of the projections."""
    bad, error, message = BAD[case]
    x, layers = torch.ones(4, 6), [good(), bad]
    refuse(lambda: functional.dora_linears(x, layers), error, r"projections\[1\].*" + message, how)


ROLES = {"gate": 0, "up": 1}


@pytest.mark.parametrize("case", [*BAD][::4])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("how", HOW)
def test_bad_input_of_an_mlp_is_named(case, role, how):
    bad, error, message = BAD[case]
    layers = [good(), good(), projection("dora", 6, 3, inputs=5, dtype=torch.float32)]
    layers[ROLES[role]] = bad
    if case == "nothing" and role == "gate":
        pytest.skip("that is an MLP without a gate")
    refuse(lambda: functional.dora_mlp(torch.ones(4, 6), *layers), error, f"{role}.*{message}", how)


OF_AN_MLP = {
    "activation": ({"activation": "swish"}, ValueError, "activation must be one of 'silu', .*, got 'swish'"),
    "activation, function": ({"activation": F.silu}, ValueError, "activation must be one of 'silu', .*, got <"),
    "outputs": (
        {"gate": projection(out=4, rank=3, inputs=6, dtype=torch.float32)},
        ValueError,
        "gate and up must have",
    ),
    "down": ({"down": good()}, ValueError, r"down: x must be \[\*, in\] with in = 6, got shape \[4, 5\]"),
    "dropout_on": ({"dropout_on": "base"}, ValueError, "dropout_on must be 'adapter' or 'low_rank', got 'base'"),
}


@pytest.mark.parametrize("case", OF_AN_MLP)
@pytest.mark.parametrize("how", HOW)
def test_bad_input_of_an_mlp(case, how):
    changes, error, message = OF_AN_MLP[case]
    layers = {"gate": good(), "up": good(), "down": projection("dora", 6, 3, inputs=5, dtype=torch.float32)} | changes
    refuse(lambda: functional.dora_mlp(torch.ones(4, 6), **layers), error, message, how)


@pytest.mark.parametrize("how", HOW)
def test_no_projections(how):
    refuse(lambda: functional.dora_linears(torch.ones(4, 6), []), ValueError, "at least one, got none", how)
    layers, wrong = [good()], "dropout_on must be 'adapter' or 'low_rank', got True"
    refuse(lambda: functional.dora_linears(torch.ones(4, 6), layers, dropout_on=True), ValueError, wrong, how)


@pytest.mark.parametrize("meaning", ["adapter", "low_rank"])
def test_compiled_with_dropout(meaning):
    """Layers with one probability share a mask, compiled too."""
    x = activation(torch.float32)
    layers = [*projections("dora", "lora", dtype=torch.float32, dropout_p=0.4), projections("dora", dropout_p=0.2)[0]]
    layers[2] = layers[2]._replace(**{n: t.float() for n, t in layers[2]._asdict().items() if torch.is_tensor(t)})
    outcomes = []
    for function in (
        functional.dora_linears,
        torch.compile(functional.dora_linears, fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(3)
        outcomes.append(function(x, layers, dropout_on=meaning))
    torch.testing.assert_close(*outcomes)


def test_equal_layers_share_their_mask():
    x = activation(torch.float32)
    p = projection(dtype=torch.float32, dropout_p=0.4)
    left, right = functional.dora_linears(x, [p, p])
    assert torch.equal(left, right)
    assert not torch.equal(left, functional.dora_linears(x, [p])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", CASES)
def test_autocast(dtype, function):
    """PEFT's defaults: half-precision weights, float32 adapters."""
    x = activation(dtype)
    if function == "dora_linears":
        layers = projections(*KINDS, dtype=dtype, factor_dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            ys = functional.dora_linears(x, layers)
        dys = cotangents(ys)
        torch.autograd.backward(ys, dys)
        check(x, layers, ys, {name: t.grad for name, t in leaves(x, layers).items()}, dys, casts=3)
        return
    options = {"dtype": dtype, "factor_dtype": torch.float32}
    gate, up = (projection(kind, 64, 8, seed=i, **options) for i, kind in enumerate(("dora", "lora")))
    down = projection("dora", 48, 8, inputs=64, **options)
    y, dy = run_mlp(x, gate, up, down, "silu", autocast=dtype)
    budgets = blocks.mlp_budgets(x, gate, up, down, dy, "silu", casts=3)
    budgets["y"].check(y)
    budgets["x"].check(x.grad)
    for name, p in (("gate", gate), ("up", up), ("down", down)):
        for field in blocks.NAMES[1:]:
            tensor = getattr(p, field)
            if tensor is not None:
                budgets[f"{name} {field}"].check(tensor.grad, f"{name} {field}")


FORMATS = {
    "4-bit": packed_weights.bnb_4bit,
    "4-bit, nested": functools.partial(packed_weights.bnb_4bit, nested=True),
    "8-bit": functools.partial(packed_weights.scaled_8bit, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", first_in_ci(*FORMATS))
@pytest.mark.parametrize("meaning", [None, "adapter", "low_rank"])
@pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_packed_weights(kind, form, meaning, use_compile):
    """Against the textbook over what they stand for; x in another dtype than the weight's under no autocast too."""
    value, dense = FORMATS[form]((48, 64))
    assert torch.equal(packed_product.dense(value, torch.float32), dense.float())
    for dtype in (torch.bfloat16, torch.float32):
        p = projection(kind, 48, 8, inputs=64, dtype=dtype, given=False, dropout_p=0.4 if meaning else 0.0)
        if p.magnitude is not None:
            norm = functional.norm_factored(value, p.lora_A.detach(), p.lora_B.detach(), p.scaling)
            p = p._replace(weight_norm=norm, magnitude=(norm * (0.8 + 0.4 * torch.rand(48))).requires_grad_())
        x = activation(dtype, shape=(33, 64))
        over, exact = [p._replace(weight=value)], [p._replace(weight=dense.to(dtype))]
        dropped = masks(x, over)
        call = functools.partial(functional.dora_linears, dropout_on=meaning or "adapter")
        call = torch.compile(call, fullgraph=True, backend="aot_eager") if use_compile else call
        torch.manual_seed(3)
        ys = call(x, over)
        dys = cotangents(ys)
        torch.autograd.backward(ys, dys)
        grads = {name: t.grad for name, t in leaves(x, exact).items()}
        options = {"dropped": dropped, "dropout_on": meaning or "adapter", "casts": 6 if meaning else 2}
        check(x, exact, ys, grads, dys, **options)
        x.grad = None


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_packed_weights_under_transforms(transform):
    value, dense = packed_weights.bnb_4bit((48, 64), dtype=torch.float32)
    p, x = projection("dora", 48, 8, inputs=64), activation(shape=(33, 64)).detach()
    p = p._replace(**{n: t.detach() for n, t in p._asdict().items() if torch.is_tensor(t)})

    def results(weight):
        function = lambda x: functional.dora_linears(x, [p._replace(weight=weight)])[0]  # noqa: E731
        if transform == "vmap":
            return torch.vmap(function)(x)
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (x.cos(),))
        return torch.func.grad(lambda x: function(x).sin().sum())(x)

    torch.testing.assert_close(results(value), results(dense.double()))


def test_a_packed_weight_that_does_not_fit():
    value, _ = packed_weights.bnb_4bit((5, 6))
    p = changed(lora_A=torch.ones(3, 8))._replace(weight=value)
    with pytest.raises(ValueError, match=r"projections\[0\]: lora_A must be \[r, in\] = \[3, 6\]"):
        functional.dora_linears(torch.ones(4, 6), [p])
    torn = changed(weight=value._replace(absmax=value.absmax[:0]))
    with pytest.raises(ValueError, match=r"projections\[0\]: bitsandbytes 4-bit weight: absmax"):
        functional.dora_linears(torch.ones(4, 6), [torn])
