"""Blocks for tests: projections of every kind, and what ``dora_linears`` and its gradients may err by."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dorac import functional, reference
from dorac.functional import Projection
from dorac.ops import front
from dorac.testing import Budget, layer_budgets, linear_inputs
from dorac.testing.rounding import Sums, unit_roundoff

NAMES = ("weight", "lora_A", "lora_B", "magnitude", "bias")
KINDS = ("dora", "lora", "plain")
TOKENS, IN = 33, 40
OUT, RANKS, SCALINGS = (48, 17, 64), (8, 5, 16), (0.7, -1.5, 2.0)  # q, k and v: no two are alike


def first_in_ci(*values):
    """The others only in a full run."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.full) for value in values[1:])]


def projection(
    kind: str = "dora",
    out: int = 48,
    rank: int = 8,
    *,
    inputs: int = IN,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    given: bool = True,
    seed: int = 0,
    device: str = "cpu",
    transposed: bool = False,
    **options,
) -> Projection:
    """A layer of a block; its weight is frozen, what is trained requires a gradient."""
    drawn = linear_inputs(
        (1, out, inputs, rank),
        dtype=dtype,
        factor_dtype=factor_dtype,
        bias=bias,
        seed=seed,
        device=device,
        transposed=transposed,
    )
    options = {"scaling": 0.7} | options
    p = Projection(*drawn.tensors()[1:], **options)
    if kind != "dora":
        p = p._replace(magnitude=None)
    elif given:
        p = p._replace(weight_norm=functional.norm_factored(p.weight, p.lora_A, p.lora_B, p.scaling))
    if kind == "plain":
        p = p._replace(lora_A=None, lora_B=None)
    trained = ("lora_A", "lora_B", "magnitude", "bias")
    return p._replace(**{n: getattr(p, n).requires_grad_() for n in trained if getattr(p, n) is not None})


def projections(*kinds: str, **options) -> tuple[Projection, ...]:
    """One of each kind, of sizes, ranks and scalings of their own."""
    return tuple(
        projection(kind, OUT[i], RANKS[i], seed=i, **({"scaling": SCALINGS[i]} | options))
        for i, kind in enumerate(kinds)
    )


def activation(dtype: torch.dtype = torch.float64, device: str = "cpu", shape: Sequence[int] = (TOKENS, IN)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(device=device, dtype=dtype).requires_grad_()


def cotangents(ys: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in ys]


def leaves(x: Tensor, layers: Sequence[Projection]) -> dict[str, Tensor]:
    """What a gradient may reach, by name."""
    tensors = {"x": x} | {f"{i} {n}": getattr(p, n) for i, p in enumerate(layers) for n in NAMES}
    return {name: t for name, t in tensors.items() if t is not None}


def run(x, layers, dys=None, **options) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The layers' results and the gradients."""
    for t in leaves(x, layers).values():
        t.grad = None
    ys = functional.dora_linears(x, layers, **options)
    dys = cotangents(ys) if dys is None else dys
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    return ys, {name: t.grad for name, t in leaves(x, layers).items()}


def as_layer(p: Projection) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Any projection as a layer with DoRA, ``(weight, lora_A, lora_B, magnitude, bias)``, and its norm."""
    weight, a, b, magnitude, bias, norm = p[:6]
    if a is None:
        a, b = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1)
    if magnitude is None:
        magnitude = norm = torch.ones_like(weight[:, 0], dtype=torch.promote_types(weight.dtype, torch.float32))
    return (weight, a, b, magnitude, bias), norm


def budgets(
    x: Tensor, layers: Sequence[Projection], dys: Sequence[Tensor | None], *, dropout_on: str = "adapter", **options
) -> dict[str, Budget]:
    """What each result and each gradient may err by; ``dropped`` by probability.

    The gradient of x is a sum over the layers. Each of its roundings beside those that the layers' own have is at most
    u times the sum of the absolute terms, a quarter of a bound that allows for four or more.
    """
    dropped, casts = options.pop("dropped", {}), options.pop("casts", 0)
    result, of_x = {}, []
    for i, (p, dy) in enumerate(zip(layers, dys, strict=True)):
        tensors, norm = as_layer(p)
        each = layer_budgets(
            reference.dora_linear,
            reference.row_norm,
            (x, *tensors),
            Sums.of_linear(x, *tensors[:2]),
            scaling=p.scaling if p.lora_A is not None else 1.0,
            dy=dy,
            weight_norm=norm,
            casts=casts,
            **_further(p, dropped, dropout_on),
            **options,
        )
        result |= {f"{i} {name}": budget for name, budget in each.items() if name != "x"}
        of_x += [each["x"]] if dy is not None else []
    if of_x:
        dense = None if any(b.dense is None for b in of_x) else sum(b.dense for b in of_x)
        bound = (1 + len(layers) / 4) * sum(b.bound for b in of_x)
        result["x"] = Budget(sum(b.truth for b in of_x), bound, dense, max(b.longer for b in of_x))
    return result


def check(x, layers, ys, grads, dys, **options) -> None:
    """Every result within its budget, and gradients for what requires one alone, in its dtype."""
    expected = budgets(x, layers, dys, **options)
    for i, y in enumerate(ys):
        expected[f"{i} y"].check(y, f"{i} y")
    for name, tensor in leaves(x, layers).items():
        gone = name != "x" and dys[int(name.split()[0])] is None
        if tensor.requires_grad and not gone:
            assert grads[name].dtype is tensor.dtype, name
            expected[name].check(grads[name], name)
        else:
            assert grads[name] is None, name


def _further(p: Projection, dropped: dict[float, Tensor], dropout_on: str) -> dict:
    """The textbook's options for a layer with dropout."""
    if p.lora_A is None or not p.dropout_p:
        return {}
    return {"dropped": dropped[p.dropout_p], "dropout_on": dropout_on if p.magnitude is not None else "low_rank"}


def _absolute(p: Projection, x: Tensor, dy: Tensor, further: dict) -> dict[str, Tensor]:
    """The sums of the absolute terms of y and of the gradients, for an x and a dy of positive numbers."""
    tensors, norm = as_layer(p)
    wide = [None if t is None else t.detach().double() for t in (*tensors, norm)]
    s = abs(float(p.scaling)) if p.lora_A is not None else 1.0
    norm = reference.row_norm(*wide[:3], float(p.scaling)) if wide[5] is None else wide[5]
    x, weight, a, b, magnitude = (t.abs().requires_grad_() for t in (x, *wide[:4]))
    bias = None if wide[4] is None else wide[4].abs().requires_grad_()
    g, dropped = reference.magnitude_scale(magnitude, norm), further.get("dropped", 1.0)
    base, lora = x @ weight.T, s * (dropped * x) @ a.T @ b.T
    y = g * (base + lora)
    if further.get("dropout_on") == "adapter":  # |g - 1| is at most g + 1
        y = base + (g + 1) * ((dropped * x) @ weight.T) + g * lora
    y = y if bias is None else y + bias
    leaves = {n: t for n, t in zip(("x", *NAMES), (x, weight, a, b, magnitude, bias), strict=True) if t is not None}
    grads = torch.autograd.grad(y, [*leaves.values()], dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def _of_layer(p, x, off_x, dy, off_dy, dtype, *, casts, further) -> dict[str, tuple[Tensor, Tensor]]:
    """Results and gradients in float64, and what they may be off where x and dy are off by so much.

    All are linear in x and in dy: what these are off adds ``S(|x| + off_x, |dy| + off_dy) - S(|x|, |dy|)``.
    """
    tensors, norm = as_layer(p)
    options = {
        "scaling": p.scaling if p.lora_A is not None else 1.0,
        "weight_norm": norm,
        "casts": casts,
        "dtype": max((dtype, *(t.dtype for t in tensors if t is not None)), key=unit_roundoff),
        **further,
    }
    sums = Sums.of_linear(x, *tensors[:2])

    def budgets(x, dy):
        return layer_budgets(reference.dora_linear, reference.row_norm, (x, *tensors), sums, dy=dy, **options)

    high_x, high_dy = x.abs() + off_x, dy.abs() + off_dy
    exact, worst = budgets(x, dy), budgets(high_x, high_dy)
    low, high = _absolute(p, x.abs(), dy.abs(), further), _absolute(p, high_x, high_dy, further)
    return {name: (exact[name].truth, worst[name].bound + high[name] - low[name]) for name in exact}


def _times(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], u: float) -> tuple[Tensor, Tensor]:
    """A product, rounded, of numbers and what they are off."""
    (a, off_a), (b, off_b) = left, right
    high = (a.abs() + off_a) * (b.abs() + off_b)
    return a * b, high - (a * b).abs() + u * high


STEEPEST, BENT = 1.13, 0.85  # |act'| and, but for relu, |act''| are at most so large


def _activated(name: str, t: Tensor, off: Tensor, u: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An activation and its derivative of numbers that are off by so much; each evaluated to 8 u of its argument."""
    leaf = t.detach().requires_grad_()
    act = reference.ACTIVATIONS[name](leaf)
    (slope,) = torch.autograd.grad(act.sum(), leaf)
    off_slope = (t.abs() <= off).double() if name == "relu" else (BENT * off).clamp(max=2 * STEEPEST)
    evaluated = 8 * u * (1 + t.abs() + off)
    return (act.detach(), STEEPEST * off + evaluated), (slope, off_slope + evaluated)


def mlp_budgets(x, gate, up, down, dy, act, *, dropout_on="adapter", dropped=None, dropped_inner=None, casts=0):
    """What y and the gradients of ``dora_mlp`` may err by: each layer's law, and what is off on its way through."""
    dtype, dropped, dropped_inner = x.dtype, dropped or {}, dropped_inner or {}
    u = torch.finfo(dtype).eps / 2
    wide_x, wide_dy, result = x.detach().double(), dy.double(), {}
    of_x = {p: _further(layer, dropped, dropout_on) for p, layer in (("gate", gate), ("up", up)) if layer is not None}

    def layer(name, p, *numbers):
        further = of_x[name] if name in of_x else _further(p, dropped_inner, dropout_on)
        return _of_layer(p, *numbers, dtype, casts=casts, further=further)

    exactly = torch.zeros((), dtype=torch.float64)
    nothing = torch.zeros(*x.shape[:-1], len(up.weight), dtype=torch.float64)
    up_y = layer("up", up, wide_x, exactly, nothing, exactly)["y"]
    if gate is None:
        inner, slope = _activated(act, *up_y, u)
    else:
        gate_y = layer("gate", gate, wide_x, exactly, nothing, exactly)["y"]
        activated, slope = _activated(act, *gate_y, u)
        inner = _times(activated, up_y, u)
    of_down = layer("down", down, *inner, wide_dy, exactly)
    result["y"] = of_down.pop("y")
    d_inner = of_down.pop("x")
    result |= {f"down {name}": value for name, value in of_down.items()}
    if gate is None:
        d_up = _times(d_inner, slope, u)
    else:
        d_up = _times(d_inner, activated, u)
        d_gate = _times(_times(d_inner, up_y, u), slope, u)
        of_gate = layer("gate", gate, wide_x, exactly, *d_gate)
        result |= {f"gate {name}": value for name, value in of_gate.items() if name not in ("x", "y")}
    of_up = layer("up", up, wide_x, exactly, *d_up)
    result |= {f"up {name}": value for name, value in of_up.items() if name not in ("x", "y")}
    result["x"] = of_up["x"]
    if gate is not None:
        truths, bounds = zip(of_up["x"], of_gate["x"], strict=True)
        result["x"] = sum(truths), 1.5 * sum(bounds)  # as in :func:`budgets`
    return {name: Budget(*value) for name, value in result.items()}


def path_through(module: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has tensors on the CPU take the eager path of a module, too; what took it since, "training" or "inference"."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
    taken = []
    without_autocast = module._without_autocast

    def spy(plan, *arguments):
        taken.append("training" if plan.training else "inference")
        return without_autocast(plan, *arguments)

    monkeypatch.setattr(module, "_without_autocast", spy)
    return taken
