"""``dora_mlp`` in eager (``ops/eager_mlp.py``) and its kernels: results, what is kept, when the path steps aside.

On the CPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import gc
import itertools

import pytest
import torch
from blocks import activation as drawn_x
from blocks import projection
from near import Near
from test_eager import DY, KEEPING, MODES, Ops, assert_near, kept_contiguous, shifted
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, reference
from dorac.functional import Projection
from dorac.ops import eager, eager_linears, eager_mlp, front
from dorac.testing import Budget

pytest.importorskip("triton")

HALF = [torch.bfloat16, torch.float16]
ACTIVATIONS = [*eager_mlp.ACTIVATIONS]
NAMES = ("gate", "up", "down")
TENSORS = ("weight", "lora_A", "lora_B", "magnitude", "bias")
DORA, LORA = ("dora",) * 3, ("lora",) * 3
T, I, F, O = 33, 40, 72, 24
RANKS, SCALINGS = (8, 5, 16), (0.7, -1.5, 2.0)
full = pytest.mark.full


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    """Has tensors on the CPU take the path, too; what took it since, "training" or "inference"."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
    taken = []
    without_autocast = eager_mlp._without_autocast

    def spy(plan, *arguments):
        taken.append("training" if plan.training else "inference")
        return without_autocast(plan, *arguments)

    monkeypatch.setattr(eager_mlp, "_without_autocast", spy)
    return taken


def mlp(*kinds: str | None, sizes=(I, F, O), ranks=RANKS, **options) -> list[Projection | None]:
    """gate, up and down of these kinds, the first None without a gate."""
    inputs, features, out = sizes
    shapes = (features, inputs), (features, inputs), (out, features)
    return [
        None if kind is None else projection(kind, *(o, r), inputs=i, seed=n, **({"scaling": s} | options))
        for n, (kind, (o, i), r, s) in enumerate(zip(kinds, shapes, ranks, SCALINGS, strict=True))
    ]


def leaves(x: Tensor, layers) -> dict[str, Tensor]:
    tensors = {"x": x} | {
        f"{name} {of}": getattr(p, of) for name, p in zip(NAMES, layers, strict=True) if p for of in TENSORS
    }
    return {name: t for name, t in tensors.items() if t is not None}


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def run(x, layers, dy=None, autocast=None, **options) -> dict[str, Tensor]:
    """y and every gradient."""
    for t in leaves(x, layers).values():
        t.grad = None
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = functional.dora_mlp(x, *layers, **options)
    y.backward(cotangent(y) if dy is None else dy)
    return {"y": y.detach()} | {name: t.grad for name, t in leaves(x, layers).items() if t.grad is not None}


def as_layer(p: Projection | None, dtype: torch.dtype):
    """The tensors and options of ``reference.projection``."""
    if p is None:
        return None
    tensors = [t if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in p[:6]]
    return tensors[:5], {"scaling": p.scaling, "weight_norm": tensors[5]}


def textbook(x, layers, dy, activation, dtype) -> dict[str, Tensor]:
    """y and the gradients as the reference has them in ``dtype``."""
    x = x.detach().to(dtype).requires_grad_(x.requires_grad)
    of = [as_layer(p, dtype) for p in layers]
    y = reference.dora_mlp(x, *of, activation)
    named = {"x": x} | {
        f"{name} {t}": tensor
        for name, layer in zip(NAMES, of, strict=True)
        if layer
        for t, tensor in zip(TENSORS, layer[0], strict=True)
    }
    named = {name: t for name, t in named.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(named.values()), dy.detach().to(dtype))
    return {"y": y.detach()} | dict(zip(named, grads, strict=True))


def bounds(x, layers, dy, activation, norm_error=0.0) -> dict[str, Near]:
    """What each result may be off by: the path's own steps and roundings, whatever it takes of them in one.

    ``norm_error``: of the norm, relative, where the path computes it.
    """
    weights = [p.weight.dtype for p in layers if p]
    dtype, truncates = weights[0], not x.is_cuda and weights[0] is torch.bfloat16
    info = torch.finfo(dtype)
    act = reference.ACTIVATIONS[activation]

    def near(t):  # cast to the dtype of the products, if need be
        return Near.exactly(t, info.eps / 2 * (1 + truncates) if t.dtype is not dtype else 0.0)

    def half(number, to=dtype):
        return number.rounded(to, truncates)

    def g_of(p):
        g = reference.magnitude_scale(p.magnitude.detach().double(), norm_of(p).double())
        return Near.exactly(g, 2 * 2.0**-24 + norm_error)

    def forward(rows, p):
        """inner before its rounding, and h."""
        base, h = half(rows @ near(p.weight).T), None
        if p.lora_A is None:
            return base, h
        h = half(rows @ near(p.lora_A).T)
        return base + (h @ near(p.lora_B).T) * p.scaling, h

    def output(inner, p):
        y = inner if p.magnitude is None else g_of(p) * inner
        return y if p.bias is None else y + Near.exactly(p.bias)

    def of_magnitude(d_y, inner, p):
        n = Near.exactly(1 / norm_of(p).double(), 2 * 2.0**-24 + norm_error)
        zero = norm_of(p) <= 1e-12
        d_m = (d_y * inner).sum() * Near(n.value.masked_fill(zero, 0), n.error.masked_fill(zero, 0))
        return half(d_m, p.magnitude.dtype)

    def of_factor(left, right, p, scaling):
        product = half(left.T @ right, p.lora_A.dtype)
        return half(product * scaling, p.lora_A.dtype)

    x = Near.exactly(x)
    dy = Near.exactly(dy)
    gate, up, down = layers
    inner_up, h_up = forward(x, up)
    inner_up = half(inner_up)
    up_y = output(inner_up, up)
    if gate is None:
        act_TF, slope = up_y.activated(activation, act)
        z = act_TF
    else:
        inner_gate, h_gate = forward(x, gate)
        inner_gate = half(inner_gate)
        act_TF, slope = output(inner_gate, gate).activated(activation, act)
        z = act_TF * up_y
    z = half(z)
    inner_down, h_down = forward(z, down)
    result = {"y": half(half(output(inner_down, down)))}

    d_base = dy if down.magnitude is None else half(g_of(down) * dy)
    dz = half(d_base @ near(down.weight))
    if down.lora_A is not None:
        d_h = half(d_base @ near(down.lora_B) * down.scaling)
        result["down lora_B"] = of_factor(d_base, h_down, down, down.scaling)
        result["down lora_A"] = of_factor(d_h, z, down, 1.0)
        dz = half(dz + half(d_h @ near(down.lora_A)))
    if down.magnitude is not None:
        result["down magnitude"] = of_magnitude(dy, half(inner_down), down)
    if down.bias is not None:
        result["down bias"] = half(dy.sum(), down.bias.dtype)
    dx = None
    of = [("up", up, dz * (slope if gate is None else act_TF), inner_up, h_up)]
    if gate is not None:
        of.append(("gate", gate, dz * up_y * slope, inner_gate, h_gate))
    for name, p, d_y, inner, h in of:
        d_base = half(d_y if p.magnitude is None else g_of(p) * d_y)
        if p.bias is not None:
            result[f"{name} bias"] = half(d_y.sum(), p.bias.dtype)
        if p.magnitude is not None:
            result[f"{name} magnitude"] = of_magnitude(d_y, inner, p)
        parts = [d_base @ near(p.weight)]
        if p.lora_A is not None:
            d_h = half(d_base @ near(p.lora_B) * p.scaling)
            result[f"{name} lora_B"] = of_factor(d_base, h, p, p.scaling)
            result[f"{name} lora_A"] = of_factor(d_h, x, p, 1.0)
            parts.append(d_h @ near(p.lora_A))
        for part in parts:
            dx = half(part) if dx is None else half(dx + half(part))
    return result | {"x": dx}


def norm_of(p: Projection) -> Tensor:
    if p.weight_norm is not None:
        return p.weight_norm
    return reference.row_norm(*(t.detach().double() for t in p[:3]), p.scaling)


def check(x, layers, dy, actual, activation="silu", norm_error=0.0) -> None:
    """Every result within its bound and its RMS beside the textbook's; gradients for what requires one alone."""
    truth = textbook(x, layers, dy, activation, torch.float64)
    dense = textbook(x, layers, dy, activation, next(p.weight.dtype for p in layers if p))
    expected = bounds(x, layers, dy, activation, norm_error)
    for name, tensor in leaves(x, layers).items():
        assert (name in actual) == tensor.requires_grad, name
        assert name not in actual or actual[name].dtype is tensor.dtype, name
    assert truth.keys() == actual.keys()
    for name, value in truth.items():
        near = expected[name]
        torch.testing.assert_close(near.value, value, rtol=1e-9, atol=1e-9 * value.abs().max().item())
        Budget(value, near.error, dense[name] if len(dy) > 1 else None).check(actual[name], name)


def composed(monkeypatch, function):
    """What ``function`` returns where nothing takes a path of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(eager_mlp, "dora_mlp", lambda *arguments: None)
        patch.setattr(eager_linears, "dora_linears", lambda *arguments: None)
        patch.setattr(eager, "dora_linear", lambda *arguments, **options: None)
        return function()


def both(monkeypatch, path, function, dtype=torch.bfloat16, taken=("training",)):
    """Runs both ways; the results are near each other."""
    actual = function()
    assert path == [*taken]
    expected = composed(monkeypatch, function)
    assert path == [*taken]
    assert actual.keys() == expected.keys()
    assert_near(actual, expected, dtype)


KINDS = [DORA, LORA, ("plain", "dora", "lora"), ("dora", "plain", "plain"), ("plain", "lora", "dora")]
KINDS += [(None, "dora", "dora"), (None, "lora", "plain"), ("plain", "plain", "dora")]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", *(pytest.param(a, marks=full) for a in ACTIVATIONS[1:])])
def test_values_and_gradients(dtype, kinds, factors, bias, activation, path, device):
    x = drawn_x(dtype, device, (T, I))
    layers = mlp(*kinds, dtype=dtype, factor_dtype=factors, bias=bias, device=device)
    autocast = None if factors is None else dtype
    actual = run(x, layers, autocast=autocast, activation=activation)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual, activation)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast is not None):
        again = functional.dora_mlp(x, *layers, activation=activation)
    assert path == ["training", "inference"]
    assert torch.equal(actual["y"], again)
