"""``experts``: one adapted projection of all experts, or both with the gate between, relative to grouped plain LoRA.

Rows are sorted by expert.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dorac import functional
from dorac.bench import measure, options, report
from dorac.bench.peers import SCALING

ROUTINGS = ("random", "even", "one")
# What is measured: one projection, or both of an expert, gate_up [2 OUT, IN] and down [IN, OUT], with a gate between.
LAYERS: dict[str, functional.Gate | None] = {
    "projection": None,
    "mixtral": functional.Gate(),
    "gpt_oss": functional.Gate(interleaved=True, limit=7.0, alpha=1.702, shift=1.0),
}
TURNS = 20
DEFAULTS = {
    "cuda": {
        "experts": [8, 64],
        "shapes": [(14336, 4096), (1536, 2048)],
        "ranks": [16],
        "rows": [64, 8192],
        "routing": "random",
        "layers": ["projection", "mixtral"],
        "phases": list(options.PHASES),
        "variants": ["base-eager", "lora-eager", "dorac-eager", "base-graph", "lora-graph", "dorac-graph"],
    },
    "cpu": {
        "experts": [4],
        "shapes": [(64, 48)],
        "ranks": [8],
        "rows": [40],
        "routing": "random",
        "layers": ["projection", "mixtral"],
        "phases": list(options.PHASES),
        "variants": ["base-eager", "lora-eager", "dorac-eager"],
    },
}


class Experts(nn.Module):
    """The tensors of E layers: weight ``[E, out, in]``, factors, float32 magnitude and norm ``[E, out]``."""

    def __init__(self, experts: int, out_features: int, in_features: int, rank: int, args: argparse.Namespace) -> None:
        super().__init__()
        options = {"dtype": args.adapter_dtype, "device": args.device}
        weight = torch.randn(experts, out_features, in_features, dtype=args.dtype, device=args.device)
        self.weight = nn.Parameter(weight.mul_(in_features**-0.5), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(experts, rank, in_features, **options) * in_features**-0.5)
        self.lora_B = nn.Parameter(torch.randn(experts, out_features, rank, **options) * 0.1 * rank**-0.5)
        norm = functional.norm_factored(self.weight, self.lora_A, self.lora_B, SCALING).detach()
        self.register_buffer("norm", norm)
        self.magnitude = nn.Parameter(norm * (0.97 + 0.06 * torch.rand_like(norm)))


def base(layer: Experts, x: Tensor, offsets: Tensor) -> Tensor:
    """The frozen experts alone, torch's grouped GEMM."""
    return F.grouped_mm(x, layer.weight.mT, offs=offsets)


def lora(layer: Experts, x: Tensor, offsets: Tensor) -> Tensor:
    """Plain LoRA of three grouped products and an addition."""
    rows = x.to(layer.lora_A.dtype)
    low = F.grouped_mm(F.grouped_mm(rows, layer.lora_A.mT, offs=offsets), layer.lora_B.mT, offs=offsets)
    return torch.add(base(layer, x, offsets), low.to(x.dtype), alpha=SCALING)


def dorac(layer: Experts, x: Tensor, offsets: Tensor, gate: functional.Gate | None = None) -> Tensor:
    """DoRA with the norms given."""
    tensors = layer.weight, layer.lora_A, layer.lora_B, layer.magnitude
    given = {"scaling": SCALING, "weight_norm": layer.norm, "gate": gate}
    return functional.dora_linear_grouped(x, *tensors, offsets=offsets, **given)


class Block(nn.Module):
    """gate_up and down of the experts, and the gate between them."""

    def __init__(self, experts: int, shape: tuple[int, int], rank: int, gate: functional.Gate, args) -> None:
        super().__init__()
        out_features, in_features = shape
        self.gate_up = Experts(experts, 2 * out_features, in_features, rank, args)
        self.down = Experts(experts, in_features, out_features, rank, args)
        self.gate = gate


def with_gate(forward: Callable[[Experts, Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The same of a block, whose gate is aten's."""

    def both(layer: nn.Module, x: Tensor, offsets: Tensor) -> Tensor:
        if isinstance(layer, Experts):
            return forward(layer, x, offsets)
        return forward(layer.down, layer.gate(forward(layer.gate_up, x, offsets)), offsets)

    return both


def dorac_block(layer: nn.Module, x: Tensor, offsets: Tensor) -> Tensor:
    """The same, the gate inside of the first projection."""
    if isinstance(layer, Experts):
        return dorac(layer, x, offsets)
    return dorac(layer.down, dorac(layer.gate_up, x, offsets, layer.gate), offsets)


FORWARDS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "base": with_gate(base),
    "lora": with_gate(lora),
    "dorac": dorac_block,
    "apart": with_gate(dorac),  # dorac with the gate behind the first projection
}
VARIANTS = [f"{name}-{mode}" for mode in ("eager", "graph") for name in FORWARDS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", nargs="+", type=options.positive, metavar="E", help="as many as there are shapes")
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of an expert's weight")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--rows", nargs="+", type=options.positive, metavar="S", help="of all experts")
    parser.add_argument("--routing", choices=ROUTINGS, help="how many rows each expert gets (default: random)")
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=LAYERS,
        help="one projection OUTxIN, or Mixtral's or GPT-OSS' experts: 2 OUT x IN, the gate, IN x OUT",
    )
    parser.add_argument("--phases", nargs="+", choices=options.PHASES, help="what to measure (default: both)")
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    if len(args.experts) != len(args.shapes):
        raise options.BadInput(f"--experts takes one number for each of --shapes, got {args.experts}, {args.shapes}")
    if args.device.type == "cpu" and any(name.endswith("graph") for name in args.variants):
        raise options.BadInput("CUDA graphs need --device cuda")


def draw_offsets(rows: int, experts: int, routing: str, device: torch.device) -> Tensor:
    """Where each expert's rows end."""
    if routing == "one":
        counts = torch.zeros(experts, dtype=torch.int64)
        counts[experts // 2] = rows
    elif routing == "even":
        counts = torch.tensor([(i + 1) * rows // experts - i * rows // experts for i in range(experts)])
    else:
        counts = torch.bincount(torch.randint(experts, (rows,)), minlength=experts)
    return counts.cumsum(0).to(device, torch.int32)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per layer, shape, rank, number of rows, phase and variant, with ratios to plain LoRA in its mode."""
    shapes = zip(args.experts, args.shapes, strict=True)
    for (experts, shape), rank, kind in itertools.product(shapes, args.ranks, args.layers):
        measure.release()
        gate = LAYERS[kind]
        layer = Experts(experts, *shape, rank, args) if gate is None else Block(experts, shape, rank, gate, args)
        out = shape[0] if gate is None else shape[1]
        for rows, phase in itertools.product(args.rows, args.phases):
            x = torch.randn(rows, shape[1], dtype=args.dtype, device=args.device)
            dy = torch.randn(rows, out, dtype=args.dtype, device=args.device) if phase == "train" else None
            offsets = draw_offsets(rows, experts, args.routing, args.device)
            name = f"{experts}x{shape[0]}x{shape[1]}" + (f" {kind}" if gate is not None else "")
            case = f"{name} r{rank} {rows} rows {phase}"
            size = {"out": shape[0], "in": shape[1], "rank": rank, "tokens": rows, "phase": phase}
            yield from (record | size for record in _measured(case, layer, x, dy, offsets, args))
            layer.zero_grad(set_to_none=True)


def _measured(case, layer, x, dy, offsets, args) -> list[dict[str, object]]:
    steps, records = {}, {}
    for variant in args.variants:
        name, _, mode = variant.partition("-")
        make = functools.partial(_step, FORWARDS[name], layer, x, dy, offsets, mode)
        steps[variant], measured = measure.attempt_alone(make, args.device)
        records[variant] = {"case": case, "variant": variant} | measured | {"queued_us": measured["wall_us"]}
        report.progress(records[variant])
    alive = {name: step for name, step in steps.items() if step is not None}
    for name, measured in zip(alive, measure.in_turns([*alive.values()], args.device, TURNS), strict=True):
        if not args.profile:
            measured.pop("kernels", None)
        records[name] |= measured
    return [record | _ratios(record, records) for record in records.values()]


def _ratios(record: dict[str, object], records: dict[str, dict[str, object]]) -> dict[str, float | None]:
    beside = records.get(f"lora-{record['variant'].rpartition('-')[2]}")
    keys = {"gpu_ratio": "gpu_us", "wall_ratio": "wall_us", "peak_ratio": "peak_mib"}
    if beside is None:
        return dict.fromkeys(keys)
    return {r: record[k] / beside[k] if record.get(k) and beside.get(k) else None for r, k in keys.items()}


def _step(forward, layer, x, dy, offsets, mode) -> measure.Callback:
    step = _inference(forward, layer, x, offsets) if dy is None else _training(forward, layer, x, dy, offsets)
    return _graph(step) if mode == "graph" else step


def _inference(forward, layer, x, offsets) -> measure.Callback:
    @torch.no_grad()
    def step() -> None:
        forward(layer, x, offsets)

    return step


def _training(forward, layer, x, dy, offsets) -> measure.Callback:
    leaf = x.detach().requires_grad_()

    def step() -> None:
        forward(layer, leaf, offsets).backward(dy)
        leaf.grad = None
        layer.zero_grad(set_to_none=True)

    return step


def _graph(step: measure.Callback) -> measure.Callback:
    """The step's kernels alone, recorded once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(measure.WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
