"""Blocks for tests: projections of every kind, and what ``dora_linears`` and its gradients may err by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dorac import functional, reference
from dorac.functional import Projection
from dorac.testing import Budget, layer_budgets, linear_inputs
from dorac.testing.rounding import Sums

NAMES = ("weight", "lora_A", "lora_B", "magnitude", "bias")
KINDS = ("dora", "lora", "plain")
TOKENS, IN = 33, 40
OUT, RANKS, SCALINGS = (48, 17, 64), (8, 5, 16), (0.7, -1.5, 2.0)  # q, k and v: no two are alike


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
        further = {}
        if p.lora_A is not None and p.dropout_p:
            further = {
                "dropped": dropped[p.dropout_p],
                "dropout_on": dropout_on if p.magnitude is not None else "low_rank",
            }
        each = layer_budgets(
            reference.dora_linear,
            reference.row_norm,
            (x, *tensors),
            Sums.of_linear(x, *tensors[:2]),
            scaling=p.scaling if p.lora_A is not None else 1.0,
            dy=dy,
            weight_norm=norm,
            casts=casts,
            **further,
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
