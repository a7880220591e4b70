"""``host``: what a small layer costs the CPU: wall time in turns, launches, allocations, ops and Python calls."""

import argparse
import contextlib
import cProfile
import dataclasses
import functools
import itertools
import json
import pstats
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import dorac
from dorac.bench import measure, model, options, peers, report
from dorac.bench.report import Record
from dorac.bench.stub import stubbed_kernels
from dorac.cli import BadInput

FACTORS = ("bf16", "autocast")
WARM_UP = 5  # steps: CUDA graphs are captured in the second and third
MODES = {"eager": None, "compiled": model.COMPILE, "graphs": model.COMPILE | {"mode": "reduce-overhead"}}
BUILDERS: dict[str, Callable[[peers.Layer], nn.Module]] = {"lora": peers.LoraAlone} | {
    name: model.VARIANTS[f"{name}-compiled"].build
    for name in (
        *("peft-lora", "peft-dora", "dorac-once", "dorac-cached", "dorac-every", "dorac-peft"),
        *("dorac-every-low-rank", "dorac-peft-low-rank"),
    )
}
LORA, PEFT_LORA = "lora", "peft-lora-eager"  # what the others are related to, LoRA by hand in the same mode
VARIANTS = [f"{name}-{mode}" for mode, name in itertools.product(MODES, BUILDERS)]
_SIZES = {"layers": 8, "rank": 16, "tokens": 64, "turns": 20}
_ALL = {"dropout": 0.0, "factors": list(FACTORS), "phases": list(options.PHASES)}
DEFAULTS = {
    "cuda": _SIZES
    | _ALL
    | {
        "features": 256,
        "stub_kernels": False,
        "variants": [
            name for name in VARIANTS if name not in ("peft-lora-graphs", "peft-dora-graphs") and "low-rank" not in name
        ],
    },
    "cpu": _SIZES
    | _ALL
    | {
        "features": 32,  # aten's products take their time here
        "stub_kernels": True,
        "variants": [
            *(f"{name}-eager" for name in BUILDERS if "low-rank" not in name),
            *(f"{name}-compiled" for name in ("lora", "dorac-once", "dorac-cached", "dorac-every", "dorac-peft")),
        ],
    },
}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
NO_OPS = ("autograd::", "profiler::")  # names of the profiler's that look like an operator's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=options.positive, metavar="N", help="how many run one after the other")
    parser.add_argument("--features", type=options.positive, metavar="N", help="of a layer, in and out")
    parser.add_argument("--rank", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="rows of the activation")
    parser.add_argument("--turns", type=options.positive, metavar="N", help="in which every variant is timed once")
    parser.add_argument("--phases", nargs="+", choices=options.PHASES, help="what to measure (default: both)")
    parser.add_argument(
        "--factors",
        nargs="+",
        choices=FACTORS,
        help="bf16: lora_A and lora_B as the weight; autocast: float32, and bf16 autocast (default: both)",
    )
    parser.add_argument(
        "--stub-kernels",
        action=argparse.BooleanOptionalAction,
        help="on the CPU: take the routes of a GPU, with kernels that do nothing (default: yes)",
    )
    options.add_dropout(parser)
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured."""
    if args.stub_kernels and args.device.type != "cpu":
        raise BadInput(f"--stub-kernels runs on the CPU only, --device is {args.device}")
    if args.dtype is not torch.bfloat16 or args.adapter_dtype is not args.dtype:
        raise BadInput("host measures bfloat16 layers and has --factors for the dtypes of the adapters")


def run(args: argparse.Namespace) -> Iterator[Record]:
    """One record per setting of the factors, phase and variant; every figure is of one layer.

    - ``wall_us``: of a synchronised step, the median over turns (:func:`measure.wall_in_turns`).
    - ``lora_ratio``, ``lora_p10_p90``: the median and the 10th and 90th percentile of the turns' ratios to LoRA by hand
      in the same mode; ``peft_ratio``, ``peft_p10_p90``: to PEFT's LoRA in eager.
    - ``launches`` of kernels and graphs (None on the CPU), ``allocations``, ``ops`` (dispatcher crossings that lie in
      no other), ``all_ops`` and Python ``calls`` (cProfile's, of builtins too): one number per direction, forward and
      backward.
    """
    with stubbed_kernels() if args.stub_kernels else contextlib.nullcontext():
        for factors, phase in itertools.product(args.factors, args.phases):
            yield from _case(args, factors, phase)


@dataclasses.dataclass
class Step:
    """A step of a stack: forward, and backward from ``dy`` unless that is None (inference)."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor | None
    autocast: bool

    def __post_init__(self) -> None:
        self.leaf = self.x.detach().requires_grad_(self.dy is not None)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]

    def output(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return self.forward(self.leaf)

    def backward(self, y: Tensor) -> None:
        if self.dy is None:
            return
        y.backward(self.dy)
        self.leaf.grad = None
        for p in self.trained:
            p.grad = None

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.dy is not None):
            self.backward(self.output())
        measure.synchronize(self.x.device)


def _case(args: argparse.Namespace, factors: str, phase: str) -> Iterator[Record]:
    measure.release()
    adapter_dtype = torch.float32 if factors == "autocast" else args.dtype
    drawn = argparse.Namespace(**vars(args) | {"adapter_dtype": adapter_dtype})
    layers = [
        peers.draw_layer(peers.draw_weight(args.features, args.features, drawn), args.rank, drawn)
        for _ in range(args.layers)
    ]
    x = torch.randn(args.tokens, args.features, dtype=args.dtype, device=args.device)
    dy = torch.randn_like(x) if phase == "train" else None
    size = {"layers": args.layers, "in": args.features, "out": args.features, "rank": args.rank, "tokens": args.tokens}
    steps, records = {}, {}
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):  # they share code
        for name in args.variants:
            start = functools.partial(_start, name, layers, x, dy, factors == "autocast", steps)
            head = {"case": f"{factors} {phase}{' (stub)' if args.stub_kernels else ''}", "variant": name}
            records[name] = head | measure.guarded(start) | size | {"phase": phase, "factors": factors}
        turns = measure.wall_in_turns(steps, args.turns)
        related = {name: related_to_lora(name, turns, args.layers) for name in steps}
        for name, record in records.items():
            record |= related.get(name, {})
            if name in steps:
                record |= {key: [count / args.layers for count in both] for key, both in counts(steps[name]).items()}
            report.progress(record)
            yield record


def _start(
    name: str, layers: Sequence[peers.Layer], x: Tensor, dy: Tensor | None, autocast: bool, steps: dict[str, Step]
) -> Record:
    """Puts the step of a variant into ``steps``, warmed up."""
    base, _, mode = name.rpartition("-")
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    module = nn.Sequential(*(BUILDERS[base](layer) for layer in layers)).train(dy is not None)
    if base == "dorac-cached":
        dorac.cache_norms(module)
    forward = module if MODES[mode] is None else torch.compile(module, **MODES[mode])
    step = Step(module, forward, x, dy, autocast)
    for _ in range(WARM_UP):
        step()
    steps[name] = step
    return {} if MODES[mode] is None else {"graph_breaks": sum(breaks.values())}


def related_to_lora(name: str, turns: dict[str, list[float]], layers: int) -> Record:
    """The time of one layer, and the ratios to LoRA; None where that was not measured."""
    related = {"wall_us": statistics.median(turns[name]) / layers}
    for key, lora in (("lora", f"{LORA}-{name.rpartition('-')[2]}"), ("peft", PEFT_LORA)):
        ratio = spread = None
        if lora in turns:
            ratios = [own / other for own, other in zip(turns[name], turns[lora], strict=True)]
            ratio, spread = statistics.median(ratios), [quantile(ratios, 0.1), quantile(ratios, 0.9)]
        related |= {f"{key}_ratio": ratio, f"{key}_p10_p90": spread}
    return related


def quantile(values: Sequence[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def counts(step: Step) -> dict[str, list[int]]:
    """What a step does in each direction, by name; see :func:`run`."""
    traced, calls, on_gpu = _traced(step), _python_calls(step), step.x.device.type == "cuda"
    allocated = _cuda_allocations(step) if on_gpu else [direction["allocations"] for direction in traced]
    return {
        **({"launches": [direction["launches"] for direction in traced]} if on_gpu else {}),
        "allocations": allocated,
        "ops": [direction["ops"] for direction in traced],
        "all_ops": [direction["all_ops"] for direction in traced],
        "calls": calls,
    }


def _directions(step: Step, around: Callable[[], contextlib.AbstractContextManager]) -> None:
    """A step, with a context of its own around each direction."""
    with torch.set_grad_enabled(step.dy is not None):
        with around():
            y = step.output()
            measure.synchronize(step.x.device)
        if step.dy is not None:
            with around():
                step.backward(y)
                measure.synchronize(step.x.device)


def _cuda_allocations(step: Step) -> list[int]:
    counted = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        yield
        counted.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)

    _directions(step, around)
    return counted


def _python_calls(step: Step) -> list[int]:
    profilers = []

    def around() -> cProfile.Profile:
        profilers.append(cProfile.Profile())
        return profilers[-1]

    with torch.autograd.set_multithreading_enabled(False):  # backward in this thread, which is the one profiled
        _directions(step, around)
    return [pstats.Stats(profiler).total_calls for profiler in profilers]


DIRECTION = "dorac.bench.host direction"


def _traced(step: Step) -> list[dict[str, int]]:
    on_gpu = step.x.device.type == "cuda"
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            profile_memory=True,
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        ) as profiler:
            for _ in range(2):
                _directions(step, functools.partial(record_function, DIRECTION))
                profiler.step()
        return count_events(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def count_events(events: list[dict]) -> list[dict[str, int]]:
    """launches, allocations, ops and all_ops within each direction that a chrome trace marks, in order."""
    marks = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == DIRECTION]
    counted = []
    for mark in sorted(marks, key=lambda mark: mark["ts"]):
        within = [e for e in events if "ts" in e and mark["ts"] <= e["ts"] <= mark["ts"] + mark["dur"]]
        ops = [e for e in within if e.get("cat") == "cpu_op" and "::" in e["name"] and not e["name"].startswith(NO_OPS)]
        launches = [e for e in within if e.get("cat") in ("cuda_runtime", "cuda_driver") and e["name"] in LAUNCHES]
        counted.append(
            {
                "launches": _outermost(launches),
                "allocations": sum(e["name"] == "[memory]" and e["args"]["Bytes"] > 0 for e in within),
                "ops": _outermost(ops),
                "all_ops": len(ops),
            }
        )
    return counted


def _outermost(events: list[dict]) -> int:
    """How many lie within no other of their thread."""
    count, ends = 0, {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= ends.get(event["tid"], 0):
            count += 1
            ends[event["tid"]] = event["ts"] + event["dur"]
    return count
