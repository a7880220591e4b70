"""``mixed``: one batch whose rows use different adapters, beside LoRA with gathered factors and other ways."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import functional
from dorac.bench import measure, options, peers, report

REPLAYS = 20  # of a CUDA graph, between two readings of the clock


@dataclasses.dataclass(frozen=True)
class Case:
    """The tensors of one layer with its adapters, and which of these each row takes.

    x ``[N, tokens, in]``, index ``[N]`` (a list of it on the CPU, ``named``), and as
    :func:`dorac.functional.dora_linear_mixed` has them the others.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    weight_norm: Tensor
    scaling: Tensor
    ranks: Tensor
    index: Tensor
    named: list[int]

    @property
    def tokens(self) -> Tensor:
        return self.x.flatten(0, -2)

    def factor_bytes(self) -> int:
        """Of the adapters that are named, what is not padding, each once."""
        ranks = self.ranks.tolist()
        sides = self.lora_A.shape[2] + self.lora_B.shape[1]
        return sum(ranks[k] for k in {*self.named}) * sides * self.lora_A.element_size()


Call = Callable[[], Tensor]


def _base(case: Case) -> Call:
    return lambda: F.linear(case.x, case.weight)


def _dorac(case: Case) -> Call:
    c = case
    options = {"adapter_index": c.index, "scaling": c.scaling, "weight_norm": c.weight_norm, "ranks": c.ranks}
    return lambda: functional.dora_linear_mixed(c.x, c.weight, c.lora_A, c.lora_B, c.magnitude, **options)


def _dorac_compiled(case: Case) -> Call:
    compiled = torch.compile(functional.dora_linear_mixed, fullgraph=True, dynamic=False)
    c = case
    options = {"adapter_index": c.index, "scaling": c.scaling, "weight_norm": c.weight_norm, "ranks": c.ranks}
    return lambda: compiled(c.x, c.weight, c.lora_A, c.lora_B, c.magnitude, **options)


def _separate(case: Case) -> Call:
    """The layer once for each adapter that is named, over its rows, which are known beforehand."""
    c = case
    rows = {k: torch.tensor([i for i, other in enumerate(c.named) if other == k], device=c.x.device) for k in c.named}
    scalings = c.scaling.tolist()

    def run() -> Tensor:
        y = c.x.new_empty(*c.x.shape[:-1], len(c.weight))
        for k, own in rows.items():
            adapter = c.lora_A[k], c.lora_B[k], c.magnitude[k]
            options = {"scaling": scalings[k], "weight_norm": c.weight_norm[k]}
            y[own] = functional.dora_linear(c.x[own], c.weight, *adapter, **options)
        return y

    return run


def _gathered(case: Case) -> Call:
    """Plain LoRA, every row with copies of its adapter's factors."""
    c = case
    scaling = c.scaling.to(c.x.dtype)

    def run() -> Tensor:
        h = torch.bmm(c.x, c.lora_A[c.index].mT) * scaling[c.index].view(-1, 1, 1)
        y = F.linear(c.x, c.weight)
        return torch.baddbmm(y, h, c.lora_B[c.index].mT)

    return run


def _segmented(case: Case) -> Call:
    """Plain LoRA by the kernels that dorac has for DoRA."""
    from dorac.kernels.mixed import mixed

    c = case

    def run() -> Tensor:
        base, rows = F.linear(c.tokens, c.weight), c.tokens
        return mixed(base, rows, c.lora_A, c.lora_B, None, None, c.scaling, None, c.index, c.ranks)[0]

    return run


def _one(case: Case) -> Call:
    """Plain LoRA with one adapter, of the largest rank, for all rows."""
    c, rows = case, case.tokens
    k = int(case.ranks.argmax())
    lora_A, columns = c.lora_A[k], c.lora_B[k].mT

    def run() -> Tensor:
        return torch.addmm(F.linear(rows, c.weight), F.linear(rows, lora_A), columns, alpha=peers.SCALING)

    return run


VARIANTS: dict[str, Callable[[Case], Call]] = {
    "base": _base,
    "lora-one": _one,
    "lora-gathered": _gathered,
    "lora-segmented": _segmented,
    "dorac": _dorac,
    "dorac-compiled": _dorac_compiled,
    "dorac-separate": _separate,
}


def _norms(case: Case) -> Call:
    return lambda: functional.mixed_norm(case.weight, case.lora_A, case.lora_B, case.scaling)


def _norms_separate(case: Case) -> Call:
    c, scalings = case, case.scaling.tolist()

    def run() -> None:
        for k, scaling in enumerate(scalings):
            functional.norm_factored(c.weight, c.lora_A[k], c.lora_B[k], scaling)

    return run


NORMS = {"norms": _norms, "norms-separate": _norms_separate}  # of all adapters, once for each stack
ON_CUDA_ALONE = ("lora-segmented",)  # on the CPU there are no kernels
MOST_SEPARATE = 32  # calls, beyond which nobody needs them measured


def rows(text: str) -> tuple[int, int]:
    """``N`` rows of one token, or ``NxTOKENS``."""
    return options.pair(text) if "x" in text else (options.positive(text), 1)


def ranks(text: str) -> tuple[int, ...]:
    """``R``, or ``R,R,...``, which the adapters take in turn."""
    return tuple(options.positive(part) for part in text.split(","))


DEFAULTS = {
    "cuda": {
        "shapes": [(14336, 4096), (4096, 14336)],
        "adapters": [16, 256],
        "ranks": [(16,), (8, 16, 32, 64)],
        "rows": [(1, 1), (8, 1), (64, 1), (256, 1), (8, 512)],
        "variants": [name for name in (*VARIANTS, *NORMS) if name != "dorac-compiled"],
    },
    "cpu": {
        "shapes": [(256, 128)],
        "adapters": [4],
        "ranks": [(8,), (4, 8)],
        "rows": [(1, 1), (16, 1), (4, 8)],
        "variants": [name for name in (*VARIANTS, *NORMS) if name not in ON_CUDA_ALONE],
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--adapters", nargs="+", type=options.positive, metavar="K", help="in the stack")
    parser.add_argument("--ranks", nargs="+", type=ranks, metavar="R[,R...]", help="of the adapters, in turn")
    parser.add_argument(
        "--rows", nargs="+", type=rows, metavar="N[xTOKENS]", help="of the batch, one token each or more"
    )
    options.add_variants(parser, (*VARIANTS, *NORMS))


def check(args: argparse.Namespace) -> None:
    """Refuses kernels where there are none."""
    wrong = [name for name in args.variants if name in ON_CUDA_ALONE]
    if wrong and args.device.type != "cuda":
        raise options.BadInput(f"{', '.join(wrong)} runs kernels, so it needs --device cuda")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per shape, stack, batch and variant, inference, norms given.

    ``gpu_us`` with a cold L2 cache; ``graph_us`` is the wall time in a CUDA graph. ``limit_us``: the base product as
    measured and the bytes of the factors that are named at the device's bandwidth; ``beyond_us`` is what ``gpu_us`` has
    more. ``gpu_one``, ``gpu_gathered``, ``graph_segmented`` and ``wall_gathered`` are ratios to these.
    """
    stacks = itertools.product(args.shapes, args.adapters, args.ranks, enumerate(args.rows))
    for shape, adapters, ranks_, (place, batch) in stacks:
        case = draw(shape, adapters, ranks_, batch, args)
        stack = f"{shape[0]}x{shape[1]} K{adapters} r{','.join(map(str, ranks_))}"
        if place == 0:
            yield from _of_norms(f"{stack} norms", case, args)
        name = f"{stack} {batch[0]}x{batch[1]}"
        few = len({*case.named}) <= MOST_SEPARATE
        chosen = [v for v in VARIANTS if v in args.variants and (v != "dorac-separate" or few)]
        records = measure_case(name, {v: VARIANTS[v](case) for v in chosen}, args)
        size = {"out": shape[0], "in": shape[1], "adapters": adapters, "batch": batch[0], "tokens": batch[1]}
        yield from (record | size for record in related(records, case.factor_bytes(), args.ceilings))


def _of_norms(name: str, case: Case, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """All norms, against reading the weight and the factors once."""
    moved = case.weight.nbytes + int(case.ranks.sum()) * sum(case.weight.shape) * case.lora_A.element_size()
    limit = args.ceilings.limit_us(flops=2 * case.weight.numel() * int(case.ranks.sum()), read=moved)
    for variant in args.variants:
        if variant in NORMS:
            measured = measure.attempt(lambda v=variant: NORMS[v](case), args.device, flush=True, kernels=args.profile)
            record = {"case": name, "variant": variant, "bytes": moved} | measured
            report.progress(record)
            yield record | measure.against_limit(record, limit)


def draw(shape: tuple[int, int], adapters: int, ranks_: tuple[int, ...], batch: tuple[int, int], args) -> Case:
    """Random tensors, adapters of these ranks in turn, padded; rows that name any of them."""
    (out_features, in_features), of = shape, {"dtype": args.adapter_dtype, "device": args.device}
    weight, most = peers.draw_weight(out_features, in_features, args), max(ranks_)
    of_each = torch.tensor([ranks_[k % len(ranks_)] for k in range(adapters)], device=args.device)
    is_rank = torch.arange(most, device=args.device) < of_each[:, None]
    lora_A = torch.randn(adapters, most, in_features, **of) * in_features**-0.5 * is_rank[:, :, None]
    lora_B = torch.randn(adapters, out_features, most, **of) * 0.1 * most**-0.5 * is_rank[:, None]
    norm = torch.rand(adapters, out_features, device=args.device) + 0.5
    magnitude = norm * (0.97 + 0.06 * torch.rand_like(norm))
    index = torch.randint(adapters, (batch[0],), device=args.device)
    x = torch.randn(*batch, in_features, dtype=args.dtype, device=args.device)
    scaling = torch.full((adapters,), peers.SCALING, device=args.device)
    tensors = lora_A.to(args.adapter_dtype), lora_B.to(args.adapter_dtype), magnitude, norm, scaling, of_each
    return Case(x, weight, *tensors, index, index.tolist())


@torch.no_grad()
def measure_case(name: str, calls: dict[str, Call], args: argparse.Namespace) -> list[dict[str, object]]:
    """Wall time and memory of each one after the other, GPU time in turns."""
    measure.release()
    records, alive = {}, {}
    for variant, call in calls.items():
        built, measured = measure.attempt_alone(lambda call=call: call, args.device)
        graph_us = None if built is None else _graph_us(built, args.device)
        records[variant] = {"case": name, "variant": variant} | measured | {"graph_us": graph_us}
        if built is not None:
            alive[variant] = built
        report.progress(records[variant])
    together = measure.on_the_gpu([*alive.values()], args.device, flush=True)
    for variant, measured in zip(alive, together, strict=True):
        if not args.profile:
            measured.pop("kernels", None)
        records[variant] |= measured
    return [*records.values()]


def _graph_us(call: Call, device: torch.device) -> float | None:
    """Wall time of a replay; None on the CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return measure.wall_us(graph.replay, device, flush=False, calls=REPLAYS)


def related(records: list[dict[str, object]], factors: int, ceilings: measure.Ceilings) -> list[dict[str, object]]:
    """The records of one case with their limit and their ratios; None where the other was not measured."""
    named = {record["variant"]: record for record in records}
    base = measure.work_us(named["base"]) if "base" in named else None
    limit = None if base is None else base + ceilings.limit_us(flops=0, read=factors)

    def ratio(record: dict[str, object], other: str, key: str) -> float | None:
        reference = named.get(other, {}).get(key)
        return record[key] / reference if reference and record[key] is not None else None

    return [
        record
        | {
            "bytes": factors,
            **(measure.against_limit(record, limit) if limit else {"limit_us": None, "fraction_of_limit": None}),
            "beyond_us": None if limit is None or (us := measure.work_us(record)) is None else us - limit,
            "gpu_one": ratio(record, "lora-one", "gpu_us"),
            "gpu_gathered": ratio(record, "lora-gathered", "gpu_us"),
            "graph_segmented": ratio(record, "lora-segmented", "graph_us"),
            "wall_gathered": ratio(record, "lora-gathered", "wall_us"),
        }
        for record in records
    ]
