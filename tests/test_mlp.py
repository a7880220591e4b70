"""``dora_mlp`` in eager (``ops/eager_mlp.py``) and its kernels: results, what is kept, when the path steps aside.

On the CPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import gc
import itertools

import packed_weights
import pytest
import torch
from blocks import activation as drawn_x
from blocks import path_through, projection
from near import Near
from test_eager import DY, KEEPING, MODES, Ops, assert_near, kept_contiguous, shifted
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, ops, reference
from dorac.functional import Projection
from dorac.ops import eager, eager_linears, eager_mlp
from dorac.testing import Budget

pytest.importorskip("triton")

from dorac.kernels import configs
from dorac.kernels.target import CARDS

H100 = CARDS["sm_90"]
HALF = [torch.bfloat16, torch.float16]
ACTIVATIONS = [*ops.mlp.ACTIVATIONS]
NAMES = ("gate", "up", "down")
TENSORS = ("weight", "lora_A", "lora_B", "magnitude", "bias")
DORA, LORA = ("dora",) * 3, ("lora",) * 3
TOKENS, IN, FEATURES, OUT = 33, 40, 72, 24
RANKS, SCALINGS = (8, 5, 16), (0.7, -1.5, 2.0)
full = pytest.mark.full


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    return path_through(eager_mlp, device, monkeypatch)


def mlp(*kinds: str | None, sizes=(IN, FEATURES, OUT), ranks=RANKS, **options) -> list[Projection | None]:
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


def check(x, layers, dy, actual, activation="silu", norm_error=0.0, averages=True) -> None:
    """Every result within its bound, its RMS beside the textbook's; gradients for what requires one alone.

    ``averages``: no few numbers outweigh the rest, whose roundings would not average out.
    """
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
        Budget(value, near.error, dense[name] if averages and len(dy) > 1 else None).check(actual[name], name)


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


def sampled(*options, every: int):
    """Every combination, of which CI runs one in so many."""
    cases = [*itertools.product(*options)]
    names = ["-".join(getattr(value, "__name__", str(value)) for value in case) for case in cases]
    return [
        pytest.param(*case, marks=() if i % every == 0 else full, id=name)
        for i, (case, name) in enumerate(zip(cases, names, strict=True))
    ]


@pytest.mark.parametrize(
    ("activation", "kinds", "factors", "bias", "dtype"),
    sampled(ACTIVATIONS, KINDS, [None, torch.float32], [True, False], HALF, every=11),
)
def test_values_and_gradients(activation, kinds, factors, bias, dtype, path, device):
    x = drawn_x(dtype, device, (TOKENS, IN))
    layers = mlp(*kinds, dtype=dtype, factor_dtype=factors, bias=bias, device=device)
    autocast = None if factors is None else dtype
    actual = run(x, layers, autocast=autocast, activation=activation)
    assert path == ["training"]
    # relu's slope jumps where gate is within a rounding of 0: a few numbers, which do not average out.
    check(x, layers, cotangent(actual["y"]), actual, activation, averages=activation != "relu")
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast is not None):
        again = functional.dora_mlp(x, *layers, activation=activation)
    assert path == ["training", "inference"]
    assert torch.equal(actual["y"], again)


REGIMES = {
    "aligned": ((64, 32, 128, 48), (16, 16, 16)),
    "one token": ((1, 24, 40, 8), (4, 4, 4)),
    "several strips": ((600, 16, 24, 16), (3, 2, 5)),
    "large ranks": ((40, 24, 136, 32), (136, 65, 200)),
    "several strips outside": ((130, 16, 24, 16), (70, 2, 5)),
    "one large rank": ((40, 24, 136, 32), (8, 65, 8)),
    "one of each": ((5, 8, 1, 1), (1, 1, 1)),
    "wide": ((16, 16, 300, 16), (8, 33, 64)),
}


@pytest.mark.parametrize(("dtype", "regime"), sampled(HALF, REGIMES, every=3))
def test_regimes(dtype, regime, path, device):
    (tokens, *sizes), ranks = REGIMES[regime]
    x = drawn_x(dtype, device, (tokens, sizes[0]))
    layers = mlp(*DORA, sizes=sizes, ranks=ranks, dtype=dtype, device=device)
    actual = run(x, layers)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual)


CONFIGS = {
    "narrow": (configs.MlpConfig(16, 32, 32, 4, 2, 16), configs.MlpBackwardConfig(16, 32, 64, 4, 2, 16)),
    "wide": (configs.MlpConfig(64, 16, 128, 4, 2, 32), configs.MlpBackwardConfig(32, 64, 32, 4, 2, 32)),
    "outside": (configs.MlpConfig(8, 64, 24, 4, 1), configs.MlpBackwardConfig(8, 16, 64, 4, 2)),
    "one inside": (configs.MlpConfig(16, 64, 16, 4, 1, 16), configs.MlpBackwardConfig(16, 64, 16, 4, 1, 16)),
}


@pytest.mark.parametrize(
    ("kinds", "config"), sampled([DORA, ("plain", "dora", "lora"), (None, "dora", "dora")], CONFIGS, every=3)
)
def test_configs(kinds, config, path, monkeypatch, device):
    """Whatever the launches are, the results are right."""
    forward, backward = CONFIGS[config]
    monkeypatch.setattr(configs, "mlp_config", lambda *sizes: forward)
    monkeypatch.setattr(configs, "mlp_backward_config", lambda *sizes: backward)
    ranks = (8, 16, 20) if config == "one inside" else (8, 16, 5)
    x = drawn_x(torch.float16, device, (65, IN))
    layers = mlp(*kinds, ranks=ranks, dtype=torch.float16, device=device)
    actual = run(x, layers)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual)


def test_config_thresholds():
    assert (
        configs.mlp_config(4096, 14336, 16, True, H100).block_r
        == configs.mlp_backward_config(4096, 14336, 16, H100).block_r
        == 16
    )
    for rank in (0, 384):
        assert not configs.mlp_config(4096, 14336, rank, True, H100).block_r
        assert not configs.mlp_backward_config(4096, 14336, rank, H100).block_r
    for tokens, features, rank in itertools.product((1, 33, 700, 4096, 2**27), (1, 100, 14336, 150_000), (0, 1, 64)):
        for config in (
            configs.mlp_config(tokens, features, rank, False, H100),
            configs.mlp_backward_config(tokens, features, rank, H100),
        ):
            assert config.rows % config.block_t == 0
            assert -(-tokens // config.rows) <= 65_535  # what a grid's second axis holds


def rows_of_every_kind(p: Projection, name: str) -> Projection:
    """Magnitudes of zero, of little and of either sign, a bias far above the rest, and a zero row."""
    p = p._replace(**{n: getattr(p, n).detach().clone() for n in ("weight", "lora_B", "magnitude", "bias")})
    p.magnitude[:4] = torch.tensor([0.0, 1e-4, -1e-3, -1.0])
    p.bias[4] = 20.0
    p.weight[5], p.lora_B[5] = 0, 0
    trained = {n: getattr(p, n).requires_grad_() for n in ("lora_B", "magnitude", "bias")}
    return p._replace(weight_norm=functional.norm_factored(*(t.detach() for t in p[:3]), p.scaling), **trained)


@pytest.mark.parametrize(("dtype", "activation"), [*zip(HALF, ["silu", "relu"], strict=True)])
def test_rows_of_every_kind(dtype, activation, path, device):
    x, layers = drawn_x(dtype, device, (TOKENS, IN)), mlp(*DORA, dtype=dtype, device=device)
    layers = [rows_of_every_kind(p, name) for p, name in zip(layers, NAMES, strict=True)]
    actual = run(x, layers, activation=activation)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual, activation, averages=False)
    for name in NAMES:
        assert actual[f"{name} magnitude"][5] == 0
        assert actual[f"{name} magnitude"][0] != 0


@pytest.mark.parametrize("factors", [None, torch.float32])
def test_norms_computed(factors, path, device):
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    layers = mlp(*DORA, dtype=torch.bfloat16, factor_dtype=factors, given=False, device=device)
    actual = run(x, layers, autocast=None if factors is None else torch.bfloat16)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual, norm_error=4e-5)  # see test_kernels.py


EDITS = {
    "one dimension": lambda x: x[0],
    "three dimensions": lambda x: x.view(3, 11, -1),
    "transposed": lambda x: x.view(3, 11, -1).transpose(0, 1),
    "columns": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "misaligned": shifted,
}


@pytest.mark.parametrize("edit", EDITS)
def test_layouts_of_x(edit, path, monkeypatch, device):
    x = EDITS[edit](drawn_x(torch.bfloat16, device, (TOKENS, IN)).detach()).requires_grad_()
    layers = mlp("dora", "lora", "dora", dtype=torch.bfloat16, device=device)
    both(monkeypatch, path, lambda: run(x, layers))
    path.clear()
    y = functional.dora_mlp(x, *layers)
    assert y.shape == (*x.shape[:-1], OUT)
    y.add_(1)  # a consumer in place
    assert path == ["training"]


@pytest.mark.parametrize(("how", "kinds"), sampled(DY, [DORA, LORA], every=2))
def test_gradients_of_any_layout(how, kinds, path, monkeypatch, device):
    x, layers = drawn_x(torch.float16, device, (TOKENS, IN)), mlp(*kinds, dtype=torch.float16, device=device)
    dy = DY[how](cotangent(x.new_empty(TOKENS, OUT)))
    both(monkeypatch, path, lambda: run(x, layers, dy), torch.float16)


def transposed(p: Projection) -> Projection:
    return p._replace(**{n: getattr(p, n).detach().t().contiguous().t().requires_grad_() for n in ("lora_A", "lora_B")})


def test_transposed_and_mixed_factors(path, monkeypatch, device):
    """Transposed weights and factors, and under autocast factors of two dtypes and x in float32."""
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    gate, up, down = mlp(*DORA, dtype=torch.bfloat16, device=device, transposed=True)
    both(monkeypatch, path, lambda: run(x, (gate, transposed(up), transposed(down))))
    path.clear()
    wide = {n: getattr(up, n).detach().float().requires_grad_() for n in ("lora_A", "lora_B")}
    layers = gate, transposed(up._replace(**wide)), transposed(down)
    both(monkeypatch, path, lambda: run(x.detach().float().requires_grad_(), layers, autocast=torch.bfloat16))


@pytest.mark.parametrize("kinds", [DORA, LORA], ids=str)
@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_frozen(kinds, frozen, path, device):
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*kinds, dtype=torch.bfloat16, device=device)
    for tensor in [x] if frozen == "x" else [p.bias for p in layers]:
        tensor.requires_grad_(False)
    actual = run(x, layers)
    assert path == ["training"]
    check(x, layers, cotangent(actual["y"]), actual)


def detached(p: Projection, *names: str) -> Projection:
    return p._replace(**{n: getattr(p, n).detach() for n in names})


NOT_TAKEN = {
    "lora_B alone": lambda g, u, d: (detached(g, "lora_A", "magnitude"), u, d),
    "magnitude frozen": lambda g, u, d: (g, detached(u, "magnitude"), d),
    "down's adapter frozen": lambda g, u, d: (g, u, detached(d, "lora_A", "lora_B", "magnitude")),
    "weight trained": lambda g, u, d: (g._replace(weight=g.weight.clone().requires_grad_()), u, d),
    "misaligned": lambda g, u, d: (g, u._replace(weight=shifted(u.weight)), d),
    "tensor scaling": lambda g, u, d: (g, u, d._replace(scaling=torch.tensor(d.scaling))),
    "bias of LoRA in float32": lambda g, u, d: (
        g,
        u,
        d._replace(magnitude=None, weight_norm=None, bias=d.bias.detach().float()),
    ),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_arrangements_that_are_not_taken(case, path, monkeypatch, device):
    x = drawn_x(torch.float16, device, (TOKENS, IN))
    layers = NOT_TAKEN[case](*mlp(*DORA, dtype=torch.float16, device=device))
    both(monkeypatch, path, lambda: run(x, layers), torch.float16, taken=())


def test_nothing_to_train_before_down_is_not_taken(path, monkeypatch, device):
    x = drawn_x(torch.float16, device, (TOKENS, IN)).detach()
    layers = mlp("plain", "plain", "dora", dtype=torch.float16, device=device)
    both(monkeypatch, path, lambda: run(x, [detached(p, "bias") for p in layers]), torch.float16, taken=())


def test_no_tokens_and_dropout_are_not_taken(path, device):
    layers = mlp(*DORA, dtype=torch.float16, device=device)
    x = drawn_x(torch.float16, device, (0, IN))
    y = functional.dora_mlp(x, *layers)
    y.sum().backward()
    assert y.shape == (0, OUT)
    assert not layers[0].lora_B.grad.any()
    dropping = [p._replace(dropout_p=0.5) for p in layers]
    functional.dora_mlp(drawn_x(torch.float16, device, (TOKENS, IN)), *dropping).sum().backward()
    assert not path


@pytest.mark.parametrize(("kinds", "factors"), [(DORA, torch.float32), (("plain", "dora", "lora"), None)], ids=str)
def test_two_runs_give_the_same_bits(kinds, factors, path, device):
    x = drawn_x(torch.bfloat16, device, (70, IN))
    layers = mlp(*kinds, dtype=torch.bfloat16, factor_dtype=factors, given=False, device=device)
    runs = [run(x, layers, autocast=torch.bfloat16 if factors else None) for _ in range(2)]
    assert path == ["training"] * 2
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@pytest.mark.parametrize(
    ("kinds", "ranks"), sampled([DORA, LORA, (None, "dora", "dora")], [RANKS, (80, 5, 80)], every=2)
)
def test_backward_twice_adds_up(kinds, ranks, path, device):
    """The first, which keeps the graph, writes over nothing that the second needs."""
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    layers = mlp(*kinds, ranks=ranks, dtype=torch.bfloat16, device=device)
    y = functional.dora_mlp(x, *layers)
    dy = cotangent(y)
    y.backward(dy, retain_graph=True)
    named = {name: t for name, t in leaves(x, layers).items() if t.requires_grad}
    once = {name: t.grad.clone() for name, t in named.items()}
    y.backward(dy)
    for name, grad in once.items():
        assert torch.equal(named[name].grad, 2 * grad), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


def test_what_is_kept_is_written_over(path, monkeypatch, device):
    """Where the graph is not kept and no hook looks on; a pass that raised after that cannot be repeated."""
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    seen = []

    def kept(retain=False, hooks=None):
        with hooks or contextlib.nullcontext():
            y = functional.dora_mlp(x, *layers)
        inners = gate, down = [y.grad_fn.saved_tensors[i] for i in (4, 6)]
        assert (gate.shape, down.shape) == ((TOKENS, FEATURES), y.shape)
        before = [inner.clone() for inner in inners]
        y.backward(cotangent(y), retain_graph=retain)
        return [*map(torch.equal, inners, before)]

    assert not any(kept())
    assert all(kept(retain=True))
    assert all(kept(hooks=torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)))

    def fails(*arguments):
        raise MemoryError("out of memory")

    y = functional.dora_mlp(x, *layers)
    with monkeypatch.context() as patch:
        patch.setattr(eager, "wide_mm", fails)
        with pytest.raises(MemoryError):
            y.backward(cotangent(y))
    with pytest.raises(RuntimeError, match="a second time: what it had saved is overwritten"):
        y.backward(cotangent(y))


@pytest.mark.parametrize(("layer", "name"), sampled(range(3), TENSORS[:4], every=5))
def test_a_parameter_that_has_been_written_to_is_refused(layer, name, path, device):
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    y = functional.dora_mlp(x, *layers)
    with torch.no_grad():
        getattr(layers[layer], name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(cotangent(y))


@pytest.mark.parametrize(
    ("kinds", "factors"),
    sampled([DORA, ("lora", "plain", "dora"), (None, "dora", "lora")], [torch.float32, None], every=2),
)
def test_second_derivatives(kinds, factors, path, monkeypatch, device):
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    layers = mlp(*kinds, dtype=torch.bfloat16, factor_dtype=factors, device=device)
    named = {name: t for name, t in leaves(x, layers).items() if t.requires_grad}

    def twice():
        for t in named.values():
            t.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
            y = functional.dora_mlp(x, *layers)
        first = torch.autograd.grad(y.float().square().sum(), [*named.values()], create_graph=True)
        sum(grad.float().square().sum() for grad in first).backward()
        return {name: t.grad for name, t in named.items() if t.grad is not None}

    actual = twice()
    assert path == ["training"]
    expected = composed(monkeypatch, twice)
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():  # through some ten roundings of bfloat16
        assert (actual[name].double() - truth.double()).norm() <= 16 * 2**-8 * truth.double().norm(), name


def test_batched_gradients(path, monkeypatch, device):
    """``is_grads_batched`` is a vmap of torch.autograd's own."""
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    named = {name: t for name, t in leaves(x, layers).items() if t.requires_grad}
    dy = torch.stack([cotangent(x.new_empty(TOKENS, OUT)), -cotangent(x.new_empty(TOKENS, OUT))])

    def batched():
        y = functional.dora_mlp(x, *layers)
        return dict(zip(named, torch.autograd.grad(y, [*named.values()], dy, is_grads_batched=True), strict=True))

    both(monkeypatch, path, batched)


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("again", [True, False])
def test_backward_inside_autocast(other, again, path, device):
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    layers, gradients = mlp(*DORA, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device), []
    for inside in (False, True):
        with torch.autocast(device, torch.bfloat16):
            y = functional.dora_mlp(x, *layers)
        trained = [t for t in leaves(x, layers).values() if t.requires_grad]
        with torch.autocast(device, other, enabled=inside):
            gradients.append(torch.autograd.grad(y, trained, cotangent(y), create_graph=again))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("keeping", "kinds"), sampled(KEEPING, [DORA, LORA], every=2))
def test_keeping(keeping, kinds, path, monkeypatch, device):
    how = KEEPING[keeping]
    x, layers = drawn_x(torch.bfloat16, device, (3, 11, IN)), mlp(*kinds, dtype=torch.bfloat16, device=device)

    def step():
        for t in leaves(x, layers).values():
            t.grad = None
        with how() if callable(how) else contextlib.nullcontext():
            block = functools.partial(functional.dora_mlp, gate=layers[0], up=layers[1], down=layers[2])
            y = checkpoint(block, x, use_reentrant=how) if isinstance(how, bool) else block(x)
        y.backward(cotangent(y))
        return {name: t.grad for name, t in leaves(x, layers).items() if t.grad is not None}

    recomputed = ["inference", "training"] if how is True else ["training"] * (1 + (how is False))
    both(monkeypatch, path, step, taken=recomputed)


@pytest.mark.parametrize("kinds", [DORA, LORA, (None, "dora", "lora")], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32])
def test_saved_bytes(kinds, factors, path, device):
    """x, h, casts of the factors, inner of gate and up; of down h, and with DoRA inner."""
    layers = mlp(*kinds, dtype=torch.bfloat16, factor_dtype=factors, bias=False, device=device)
    x, kept = drawn_x(torch.bfloat16, device, (32, IN)), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    autocast = torch.autocast(device, torch.bfloat16, enabled=factors is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        functional.dora_mlp(x, *layers)
    assert path == ["training"]
    there = [p for p in layers if p]
    given = [x, *(t for p in there for t in (p.weight, p.weight_norm) if t is not None)]
    assert all(kept.pop(t.untyped_storage().data_ptr()) == t.untyped_storage().nbytes() for t in given)
    ranks = [len(p.lora_A) for p in there]
    expected = [32 * FEATURES * 2] * (len(there) - 1) + [32 * sum(ranks[:-1]) * 2, 32 * ranks[-1] * 2]
    if factors is not None:
        expected.append(2 * sum(p.lora_A.numel() + p.lora_B.numel() for p in there))
    if there[-1].magnitude is not None:
        expected.append(32 * OUT * 2)
    assert sorted(kept.values()) == sorted(expected)


@pytest.fixture
def no_launches(device, monkeypatch):
    """Triton's interpreter makes cycles of references."""
    if device == "cpu":
        from dorac.kernels import launch

        monkeypatch.setattr(launch.Bound, "__call__", lambda *arguments: None)


@pytest.mark.usefixtures("no_launches")
def test_what_is_kept_goes_with_the_graph(path, device):
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    gc.disable()
    try:
        for backward in (True, False):
            y = functional.dora_mlp(x, *layers)
            kept = [StorageWeakRef(y.untyped_storage())]
            kept += [StorageWeakRef(t.untyped_storage()) for t in y.grad_fn.saved_tensors[2:7]]
            loss = y.float().sum()
            del y
            assert not any(ref.expired() for ref in kept[1:])
            if backward:
                loss.backward()
            else:
                del loss
            assert all(ref.expired() for ref in kept)
    finally:
        gc.enable()


SAVED = {
    "dora": {},
    "mixed": {"kinds": ("plain", "dora", "lora")},
    "no gate": {"kinds": (None, "lora", "dora"), "activation": "gelu"},
    "norm computed": {"given": False},
    "autocast": {"factor_dtype": torch.float32},
    "large ranks": {"ranks": (80, 5, 80), "bias": False},
    "no leaves": {"leaves": False},
}


def seen_in_part(device, call, over_forward, over_backward, kinds=DORA, activation="silu", **options):
    """The gradients of an MLP that ``call`` runs, with modes over it."""
    leaf = options.pop("leaves", True)
    x, autocast = drawn_x(torch.bfloat16, device, (TOKENS, IN)), "factor_dtype" in options
    layers = used = mlp(*kinds, dtype=torch.bfloat16, device=device, **options)
    if not leaf:
        used = [p._replace(**{n: t.view_as(t) for n, t in p._asdict().items() if torch.is_tensor(t)}) for p in layers]

    def block(x):
        return functional.dora_mlp(x, *used, activation=activation).float().square().sum()

    with MODES[over_forward](), torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = call(block, x)
    with MODES[over_backward]():
        loss.backward()
    return {name: t.grad for name, t in leaves(x, layers).items() if t.grad is not None}


@pytest.mark.parametrize(
    ("over", "case"), sampled([("ops", "none"), ("none", "ops"), ("none", "flops")], SAVED, every=2)
)
def test_a_checkpoint_with_a_mode_over_one_direction(over, case, path, monkeypatch, device):
    """The recomputation keeps what the forward kept, although a mode looks on in one of them alone."""
    call = functools.partial(checkpoint, use_reentrant=False)
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]))


@pytest.mark.parametrize(
    ("keeping", "over", "case"),
    sampled(
        [contextlib.nullcontext, kept_contiguous], [("ops", "none"), ("none", "ops"), ("ops", "ops")], SAVED, every=4
    ),
)
def test_a_mode_over_an_mlp_in_part(keeping, over, case, path, monkeypatch, device):
    def call(block, x):
        with keeping():
            return block(x)

    taken = ["training"] if over[0] == "none" else []
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]), taken=taken)


@pytest.mark.parametrize(
    ("over", "saved", "case"),
    sampled(
        [("none", "none"), ("ops", "none"), ("none", "ops")],
        ["nothing", "dorac", "everything"],
        ["dora", "mixed", "autocast"],
        every=4,
    ),
)
def test_selective_checkpointing_sees_the_ops(over, saved, case, path, monkeypatch, device):
    seen = []

    def policy(context, op, *args, **kwargs):
        if op.namespace == "dorac":
            seen.append(op._schema.name.removeprefix("dorac::"))
        saves = saved == "everything" or op.namespace == saved
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    call = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    eager.forget_plans()  # making one is not seen
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]), taken=[])
    assert seen


def test_a_dispatch_mode_sees_the_ops(path, device):
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    with Ops() as forward:
        y = functional.dora_mlp(x, *layers)
    with Ops() as backward:
        y.backward(cotangent(y))
    assert (forward.seen, backward.seen) == ({"up_compose_forward"}, {"lora_b_backward"})
    assert not path


@pytest.mark.parametrize("kinds", [DORA, LORA, ("plain", "dora", "plain")], ids=str)
def test_flops_are_those_of_the_composition(kinds, path, monkeypatch, device):
    def flops():
        x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
        layers = mlp(*kinds, dtype=torch.bfloat16, device=device, bias=False)
        with FlopCounterMode(display=False) as counter:
            functional.dora_mlp(x, *layers).sum().backward()
        return counter.get_total_flops()

    counted = flops()
    assert not path
    assert counted == composed(monkeypatch, flops) > 4 * TOKENS * FEATURES * (2 * IN + OUT)


def traced(x, layers):
    make_fx(lambda x: functional.dora_mlp(x, *layers))(x)


class Block(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return functional.dora_mlp(x, *self.layers)


def loss_of(layers):
    return lambda x: functional.dora_mlp(x, *layers).float().sum()


STEPS_ASIDE = {
    "make_fx": traced,
    "vmap": lambda x, layers: torch.vmap(Block(layers))(x[None].repeat(2, 1, 1)),
    "grad": lambda x, layers: torch.func.grad(loss_of(layers))(x),
    "jvp": lambda x, layers: torch.func.jvp(loss_of(layers), (x,), (x,)),
    "compile": lambda x, layers: torch.compile(Block(layers), fullgraph=True, backend="aot_eager")(x),
    "export": lambda x, layers: torch.export.export(Block(layers), (x,)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("observer", STEPS_ASIDE)
def test_steps_aside(observer, path, device):
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN)).detach()
    layers = [detached(p, *TENSORS) for p in mlp(*DORA, dtype=torch.bfloat16, device=device)]
    functional.dora_mlp(x, *layers)  # a plan is there
    assert path == ["inference"]
    STEPS_ASIDE[observer](x, layers)
    assert path == ["inference"]
    functional.dora_mlp(x, *layers)
    assert path == ["inference"] * 2


CHANGES = {
    "values": {"seed": 5},
    "factors": {"factor_dtype": torch.float32},
    "rank": {"rank": 9},
    "bias": {"bias": False},
    "kind": {"kind": "lora"},
    "transposed": {"transposed": True},
    "norm": {"given": False},
    "scaling": {"scaling": 3.0},
}


@pytest.mark.parametrize("change", [c if i % 3 == 0 else pytest.param(c, marks=full) for i, c in enumerate(CHANGES)])
def test_no_plan_serves_another_combination(change, path, monkeypatch, device):
    """Called as it was, then with another layer for up, with another activation, and again as it was."""
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    gate, up, down = mlp(*DORA, dtype=torch.bfloat16, device=device)
    options = {"kind": "dora", "out": FEATURES, "rank": 5, "seed": 1, "scaling": -1.5, "inputs": IN} | CHANGES[change]
    other = projection(dtype=torch.bfloat16, device=device, **options)
    for middle, activation in ((up, "silu"), (other, "silu"), (up, "relu"), (up, "silu")):
        path.clear()
        call = functools.partial(run, x, (gate, middle, down), autocast=torch.bfloat16, activation=activation)
        both(monkeypatch, path, call)


def test_switches_between_two_calls(path, monkeypatch, device):
    """Gradients and autocast's dtype: each call has its own plan, and comes out as without."""
    x = drawn_x(torch.bfloat16, device, (TOKENS, IN))
    layers = mlp(*DORA, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    for training, dtype in [*itertools.product((True, False), (torch.bfloat16, torch.float16, None))] * 2:
        path.clear()

        def call(training=training, dtype=dtype):
            with torch.set_grad_enabled(training), torch.autocast(device, dtype, enabled=dtype is not None):
                y = functional.dora_mlp(x, *layers)
            assert y.requires_grad == training
            return {"y": y.detach()}

        kind = ["training" if training else "inference"] if dtype is torch.bfloat16 else []
        both(monkeypatch, path, call, taken=kind)


BAD = {
    "no projection": lambda g, u, d: ((g, u, d[:6]), "down must be a Projection, got tuple"),
    "sizes": lambda g, u, d: (
        (g, u._replace(weight=u.weight[:8], lora_B=u.lora_B[:8], magnitude=None, bias=None, weight_norm=None), d),
        r"gate and up must have as many outputs as each other, got 72 and 8",
    ),
    "down": lambda g, u, d: ((g, u, g), r"down: x must be \[\*, in\] with in = 40, got shape \[33, 72\]"),
    "scaling": lambda g, u, d: (
        (g._replace(scaling=float("nan")), u, d),
        "gate: scaling must be finite in float32",
    ),
    "dtype": lambda g, u, d: ((g, u, d._replace(weight=d.weight.int())), "down: weight must be"),
    "magnitude": lambda g, u, d: (
        (g, u._replace(magnitude=u.magnitude[1:]), d),
        r"up: magnitude must be \[out\] = \[72\], got shape \[71\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(case, path, device):
    """Before any work, in the first call and in a later one, and no plan remains of it."""
    x, layers = drawn_x(torch.bfloat16, device, (TOKENS, IN)), mlp(*DORA, dtype=torch.bfloat16, device=device)
    bad, sentence = BAD[case](*layers)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=sentence):
            functional.dora_mlp(x, *bad)
    assert not eager.plans
    functional.dora_mlp(x, *layers)
    with pytest.raises((TypeError, ValueError), match=sentence):
        functional.dora_mlp(x, *bad)
    assert path == ["training"]
    with pytest.raises(ValueError, match="activation must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', got 'tanh'"):
        functional.dora_mlp(x, *layers, activation="tanh")


def packed_mlp(*kinds, device="cpu", factors=None):
    """An MLP over 4-bit weights, and the same over what these stand for."""
    layers = mlp(*kinds, sizes=(64, 128, 64), dtype=torch.bfloat16, factor_dtype=factors, given=False, device=device)
    over, dense = [], []
    for i, p in enumerate(layers):
        if p is None:
            over.append(None)
            dense.append(None)
            continue
        value, weight = packed_weights.bnb_4bit(tuple(p.weight.shape), nested=i != 1, seed=i)
        value = value._replace(**{n: t.to(device) for n, t in value._asdict().items() if torch.is_tensor(t)})
        p = p._replace(weight=weight.to(device))
        if p.magnitude is not None:
            norm = functional.norm_factored(p.weight, p.lora_A.detach(), p.lora_B.detach(), p.scaling)
            p = p._replace(weight_norm=norm)
        over.append(p._replace(weight=value))
        dense.append(p)
    return over, dense


@pytest.mark.parametrize(
    ("case", "kinds", "factors"),
    [
        ("plain", DORA, torch.float32),
        ("plain", (None, "dora", "lora"), None),
        ("second", ("lora", "plain", "dora"), None),
        ("mode over backward", DORA, None),
        ("mode over forward", ("plain", "dora", "lora"), None),
        ("no grad", DORA, torch.float32),
    ],
    ids=str,
)
def test_packed_weights(case, kinds, factors, path, device):
    """The bits of the layers over dense weights, and nothing of a weight's size is kept."""
    over, dense = packed_mlp(*kinds, device=device, factors=factors)
    x, outcomes = drawn_x(torch.bfloat16, device, (TOKENS, 64)), []
    for layers in (over, dense):
        trained = [x, *(t for p in layers if p for t in p[1:5] if t is not None and t.requires_grad)]
        over_forward = Ops() if case == "mode over forward" else torch.set_grad_enabled(case != "no grad")
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t)
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None), over_forward, hooks:
            y = functional.dora_mlp(x, *layers)
        if case == "no grad":
            outcomes.append([y])
            continue
        assert (torch.Size((128, 64)) in kept) == (layers is dense)
        with Ops() if case == "mode over backward" else contextlib.nullcontext():
            grads = torch.autograd.grad(y, trained, cotangent(y), create_graph=case == "second")
        if case == "second":
            grads = torch.autograd.grad(sum(g.float().square().sum() for g in grads), trained, allow_unused=True)
        outcomes.append([g for g in grads if g is not None])
    assert all(map(torch.equal, *outcomes))
    taken = {"no grad": "inference"}.get(case, "training")
    assert path == ([] if case == "mode over forward" else [taken] * 2)


@pytest.mark.parametrize("layer", range(3))
def test_a_packed_weight_that_has_been_written_to_is_refused(layer, path, device):
    over, _ = packed_mlp(*DORA, device=device)
    y = functional.dora_mlp(drawn_x(torch.bfloat16, device, (TOKENS, 64)), *over)
    over[layer].weight.codes.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the bitsandbytes 4-bit weight"):
        y.backward(cotangent(y))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [DORA, LORA], ids=str)
def test_cuda_graphs(kinds, path):
    x, layers = drawn_x(torch.bfloat16, "cuda", (TOKENS, IN)), mlp(*kinds, dtype=torch.bfloat16, device="cuda")
    trained = [t for t in leaves(x, layers).values() if t.requires_grad]

    def step():
        y = functional.dora_mlp(x, *layers)
        return y.detach(), *torch.autograd.grad(y, trained, cotangent_on_device)

    cotangent_on_device = cotangent(x.new_empty(TOKENS, OUT))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))
