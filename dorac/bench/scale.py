"""``scale``: training steps of stacks that are spread over several GPUs, beside LoRA by hand in the same layout."""

import argparse
import collections
import contextlib
import functools
import itertools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dorac.bench import bases, measure, model, options, report, timeline
from dorac.bench.measure import MIB
from dorac.bench.report import Record
from dorac.bench.stub import stubbed_kernels
from dorac.cli import BadInput

LAYOUTS = ("tp", "sp", "fsdp2", "hsdp", "tp-fsdp2")  # of dorac.bench.spread
KINDS = ("lora", "dorac-every", "dorac-cached", "dorac-peft")
# Blocks by dorac.fuse; compiled code is that of the layers.
FUSED = ("dorac-fused-every-eager", "dorac-fused-cached-eager")
VARIANTS = [*(f"{kind}-{mode}" for mode in ("eager", "compiled") for kind in KINDS), *FUSED]
# Layouts in which the drop-in runs: its factors are modules of PEFT's, which torch's styles do not know to go together.
DROP_IN = ("fsdp2", "hsdp")
_ALL = {"stack": "mlp", "layouts": list(LAYOUTS), "batch": 1, "turns": 10, "repeats": 5, "dropout": 0.0}
DEFAULTS = {
    "cuda": model.CUDA_STACK | _ALL | {"ranks": [16, 384], "tokens": 4096, "processes": None, "variants": VARIANTS},
    "cpu": {"layers": 2, "hidden": 32, "intermediate": 64, "heads": 4, "kv_heads": 4, "tokens": 16, "ranks": [4]}
    | _ALL
    | {"processes": 2, "variants": [name for name in VARIANTS if name.endswith("eager")], "turns": 3, "repeats": 2},
}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
WARM_UP = 4  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bases.add_base(parser)
    model.add_stack_arguments(parser)
    model.add_size_arguments(parser)
    parser.add_argument("--stack", choices=("mlp", "llama"), help="of MLPs or of a Llama's blocks (default: mlp)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="to measure (default: all)")
    parser.add_argument("--turns", type=options.positive, metavar="N", help="in which every variant is timed once")
    parser.add_argument("--repeats", type=options.positive, metavar="N", help="steps of a turn")
    parser.add_argument(
        "--processes",
        type=options.positive,
        metavar="N",
        help="started here, on as many GPUs (default: all; 2 on the CPU); under torchrun those that it started",
    )
    parser.add_argument(
        "--fake",
        action="store_true",
        help="one process, one of --processes ranks of torch's fake process group: what the host and this GPU do",
    )
    parser.add_argument(
        "--stub-kernels", action="store_true", help="on the CPU: take the routes of a GPU, with kernels that do nothing"
    )
    model.add_save_outputs(parser)
    options.add_dropout(parser)
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured, and settles how many processes there are."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched and args.fake:
        raise BadInput("--fake is one process: start it without torchrun")
    if launched:
        args.processes, args.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if args.rank:  # one of them reports
            args.json = args.plot = None
            args.silent = True
    elif args.processes is None:
        args.processes = 2 if args.fake else torch.cuda.device_count()
    args.launched = launched
    if args.processes < 2:
        raise BadInput("scale is of two processes and more; on one GPU use --fake")
    if not launched and not args.fake and args.device.type == "cuda" and args.processes > torch.cuda.device_count():
        raise BadInput(f"--processes {args.processes} needs as many GPUs, this host has {torch.cuda.device_count()}")
    if args.stub_kernels and not (args.fake and args.device.type == "cpu"):
        raise BadInput("--stub-kernels is for --fake on the CPU")
    if args.stub_kernels and args.dtype is not torch.bfloat16:
        raise BadInput("--stub-kernels takes a GPU's routes, which are for --dtype bfloat16")
    model.check_save_outputs(args)
    tensor = [name for name in args.layouts if name not in DROP_IN]
    if args.base != bases.DENSE:
        if args.base not in model.FOUR_BIT:
            raise BadInput(f"--base {args.base}: fully_shard splits floats alone, in which only nf4 and fp4 can lie")
        bases.check_base(args, args.variants, args.variants)
        if "layouts" in args.left_out:
            args.layouts = [name for name in args.layouts if name in DROP_IN]
        elif tensor:
            raise BadInput(f"--base {args.base}: a quantised weight is not split by tensor parallelism ({tensor[0]})")
    if args.stack == "llama":
        if "sp" in args.layouts and "layouts" not in args.left_out:
            raise BadInput("sp is for --stack mlp: attention's forward reads its sizes off its input")
        args.layouts = [name for name in args.layouts if name != "sp"]
    for name, size in (("tokens", args.tokens), ("intermediate", args.intermediate), ("hidden", args.hidden)):
        if size % args.processes:
            raise BadInput(f"--{name} {size} must be a multiple of the number of processes, {args.processes}")
    if any(name in ("hsdp", "tp-fsdp2") for name in args.layouts) and args.processes % 2:
        raise BadInput("hsdp and tp-fsdp2 are of an even number of processes")


def run(args: argparse.Namespace) -> Iterator[Record]:
    """One record per layout, rank of the adapters and variant, of a step: forward, and backward from ``dy``.

    - ``wall_us``: of synchronised steps, the median over turns of rank 0, in which the variants are timed one after the
      other; ``wall_ratio`` the median of the turns' ratios to LoRA by hand in the same mode.
    - ``gpu_us``: kernels but NCCL's; ``nccl_us``: those, the waiting for other ranks included (CUDA only).
    - ``cpu_us``: what the CPU takes to queue a step while the GPU is busy (CUDA only).
    - ``collectives``, and ``sent_mib`` that rank 0 gives to them; by name in ``sent``. Counted in eager: compiled code
      sends the same, in fewer where sums are joined.
    - ``nccl_kernels``: that a step runs, one a collective (CUDA only).
    - ``peak_mib``: beyond what was allocated before a step.

    With FSDP the adapters are float32, as its groups need one dtype and the magnitude is float32; a bfloat16 stack then
    runs under autocast, as PEFT's defaults have it. Every rank has the same input. Norms kept stay, as between two
    optimizer steps.
    """
    if args.fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=args.processes, store=FakeStore())
        try:
            with stubbed_kernels() if args.stub_kernels else contextlib.nullcontext():
                yield from _measured(args)
        finally:
            dist.destroy_process_group()
    elif args.launched:
        dist.init_process_group(BACKENDS[args.device.type])
        yield from _measured(args)
        dist.destroy_process_group()
    else:
        yield from _in_processes(args)


def _in_processes(args: argparse.Namespace) -> Iterator[Record]:
    """The records of rank 0 of processes that are started here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    records = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_process, (args, address, records), nprocs=args.processes, join=False)
    while not (ended := context.join(timeout=0.1)) or not records.empty():
        while not records.empty():
            yield records.get()
        if ended:
            break


def _process(rank: int, args: argparse.Namespace, address: str, records: "mp.SimpleQueue") -> None:
    if args.device.type == "cuda":
        args.device = torch.device("cuda", rank)
        torch.cuda.set_device(args.device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(BACKENDS[args.device.type], init_method=address, rank=rank, world_size=args.processes)
    with torch.compiler.config.patch(force_disable_caches=True):
        for record in _measured(args):
            records.put(record)
    dist.barrier()
    os._exit(0)  # gloo's threads may need an interpreter that is being taken down


def _measured(args: argparse.Namespace) -> Iterator[Record]:
    """The records, of rank 0 alone; every rank measures."""
    for layout, rank in itertools.product(args.layouts, args.ranks):
        records = _case(args, layout, rank)
        if dist.get_rank() == 0:
            for record in related_to_lora(records):
                report.progress(record)
                yield record


def _case(args: argparse.Namespace, layout: str, rank: int) -> dict[str, Record]:
    from dorac.bench import spread

    how = spread.LAYOUTS[layout]
    drawn = argparse.Namespace(**vars(args) | ({"adapter_dtype": torch.float32} if how.data else {}))
    variants = [name for name in args.variants if layout in DROP_IN or not name.startswith("dorac-peft")]
    autocast = how.data and args.dtype is torch.bfloat16
    mesh = how.mesh(args.device)
    x = torch.randn(args.batch, args.tokens, args.hidden, dtype=args.dtype, device=args.device)
    x = x[:, : args.tokens // mesh.size()].contiguous() if how.sequence else x
    stack = "" if args.stack == "mlp" else f"{args.stack} "
    case = f"{stack}{layout} r{rank}{bases.setting(args)}{', save-outputs' * args.save_outputs}{', fake' * args.fake}"
    size = {"processes": args.processes, "layers": args.layers, "hidden": args.hidden, "rank": rank}
    size |= {"tokens": args.tokens, "batch": args.batch}
    steps: dict[str, Step] = {}

    def start(name: str) -> Record:
        steps[name] = step = Step(spread.build(drawn, how, mesh, rank, name), x, autocast)
        peak, total = measure.peak_mib(step, args.device)
        return {"cpu_us": measure.cpu_us(step, args.device), "peak_mib": peak, "total_mib": total} | step.sent()

    records = {}
    measure.release()
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):  # they share code
        for name in variants:
            measured = measure.guarded(functools.partial(start, name), (Exception,))
            if "failed" in measured:
                steps.pop(name, None)
            records[name] = {"case": case, "variant": name} | measured | size
        for name, measured in _together(steps, args).items():
            records[name] |= measured
    return records


class Step:
    """Forward, under bfloat16 autocast if asked for, and backward from ``dy``; gradients are dropped."""

    def __init__(self, stack: nn.Module, x: Tensor, autocast: bool) -> None:
        self.autocast = autocast
        self.stack, self.x, self.dy = stack, x.detach().requires_grad_(), torch.randn_like(x)
        self.trained = [p for p in stack.parameters() if p.requires_grad]
        for _ in range(WARM_UP):
            self()

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.stack(self.x)
        y.backward(self.dy)
        self.x.grad = None
        for p in self.trained:
            p.grad = None

    def sent(self) -> Record:
        """What a step gives to collectives, in eager: compiled code cannot run under a mode, and is lost by the try."""
        with torch.compiler.set_stance("force_eager"), Collectives() as counted:
            self()
        names = {name: [counted.counts[name], counted.bytes[name] / MIB] for name in sorted(counted.counts)}
        calls, size = counted.counts.total(), counted.bytes.total() / MIB
        return {"collectives": calls, "sent_mib": size, "sent": {name: list(pair) for name, pair in names.items()}}


class Collectives(TorchDispatchMode):
    """Counts the collectives under it, and the bytes of their inputs, by name: c10d's and the functional ones."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and (name := _NAMES.get(func.__name__.partition(".")[0])):
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            given = next(
                arguments[key]
                for key in ("input_tensor", "input_tensors", "tensors", "input", "inputs", "self")
                if key in arguments
            )
            given = [given] if isinstance(given, Tensor) else given
            self.counts[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(given))
        return func(*args, **(kwargs or {}))


_NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
}


def _together(steps: Mapping[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, Record]:
    """Wall and GPU time of all variants in turns. Every rank runs as many steps as the others."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.turns):
        for name in reversed(steps) if turn % 2 else steps:
            steps[name]()
            measure.synchronize(args.device)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(args.repeats):
                steps[name]()
                measure.synchronize(args.device)
            times[name].append((time.perf_counter() - start) / args.repeats * 1e6)
    records = {name: {"wall_us": statistics.median(own), "turns_us": own} for name, own in times.items()}
    if args.device.type == "cuda" and steps:
        for name, iterations in zip(steps, timeline.gpu_iterations([*steps.values()], flush=False), strict=True):
            for key, of_nccl in (("gpu_us", False), ("nccl_us", True)):
                sums = (sum(k.us for k in work if _is_nccl(k) is of_nccl) for work in iterations)
                records[name][key] = statistics.median(sums)
            records[name]["nccl_kernels"] = statistics.median(sum(map(_is_nccl, work)) for work in iterations)
    return records


def _is_nccl(kernel: timeline.Kernel) -> bool:
    return "nccl" in kernel.name.lower()


def related_to_lora(records: Mapping[str, Record]) -> Iterator[Record]:
    """The records with their ratios to LoRA by hand in the same mode; None where that was not measured."""
    for name, record in records.items():
        lora = records.get(f"lora-{name.rpartition('-')[2]}", {})
        ratios = {}
        for what in ("wall", "gpu", "cpu", "peak"):
            key = "peak_mib" if what == "peak" else f"{what}_us"
            own, other = record.get(key), lora.get(key)
            ratios[f"{what}_ratio"] = own / other if own is not None and other else None
        if "turns_us" in record and "turns_us" in lora:
            pairs = zip(record["turns_us"], lora["turns_us"], strict=True)
            ratios["wall_ratio"] = statistics.median(own / other for own, other in pairs)
        yield dict(record) | ratios
