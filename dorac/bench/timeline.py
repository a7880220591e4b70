"""What one callable does on the GPU, kernel by kernel, from the profiler's timeline."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

PROFILED = 20
ROUNDS = 4  # profiles that the iterations of several callables are spread over, so that no trace grows large
PAUSE = 2**23  # cycles, about 5 ms: the CPU queues a step meanwhile, and the GPU starts each one as cool as the last
FLUSH_BYTES = 2**28  # several times any L2 cache
MARKER = "spin_kernel"  # what torch.cuda._sleep launches
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # trace categories; the ranges of annotations have others


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One piece of work on the GPU's timeline."""

    name: str
    us: float


def flush_buffer() -> Tensor:
    """Writing it evicts everything else from the L2 cache."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def gpu_iterations(fns: Sequence[Callable[[], object]], *, flush: bool) -> list[list[list[Kernel]]]:
    """What each of ``PROFILED`` iterations of each callable does on the GPU. The flush is not counted.

    The GPU idles before each, so that all see the same clocks: otherwise whoever keeps the GPU waiting for the CPU is
    rewarded with a cooler chip. Several callables take turns iteration by iteration, there and back, so that none pays
    for a chip that the others have heated, and none comes first after every rest.
    """
    cache = flush_buffer() if flush else None
    rounds = ROUNDS if len(fns) > 1 else 1
    iterations: list[list[list[Kernel]]] = [[] for _ in fns]
    for _ in range(rounds):
        for own, profiled in zip(iterations, _profiled(fns, PROFILED // rounds, cache), strict=True):
            own += profiled
    return iterations


def _profiled(fns: Sequence[Callable[[], object]], times: int, cache: Tensor | None) -> list[list[list[Kernel]]]:
    """The iterations of each of ``fns``, ``times`` of them, from one profile."""
    there = [*range(len(fns))]
    order = [i for turn in range(times) for i in (there[::-1] if turn % 2 else there)]

    def iterate(fn: Callable[[], object]) -> None:
        if cache is not None:
            cache.zero_()
        torch.cuda._sleep(PAUSE)
        fn()
        torch.cuda.synchronize()  # also the side streams
        torch.cuda._sleep(1)
        torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        with profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        ) as profiler:
            for fn in fns:
                iterate(fn)
            profiler.step()
            for i in order:
                iterate(fns[i])
            profiler.step()
        profiled = split_iterations(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], len(order))
    return [[work for i, work in zip(order, profiled, strict=True) if i == own] for own in there]


def split_iterations(events: list[dict], count: int) -> list[list[Kernel]]:
    """The GPU work of a chrome trace, told apart by the two marker kernels around each iteration.

    Raises:
        RuntimeError: there are not two markers per iteration, so the profiler lost events.
    """
    work = sorted((event for event in events if event.get("cat") in GPU_WORK), key=lambda event: event["ts"])
    parts: list[list[Kernel]] = [[]]
    for event in work:
        if MARKER in event["name"]:
            parts.append([])
        else:
            parts[-1].append(Kernel(event["name"], event["dur"]))
    if len(parts) != 2 * count + 1:
        raise RuntimeError(f"the profiler saw {len(parts) - 1} markers, expected {2 * count}: it lost events")
    return parts[1::2]


def by_name(iterations: list[list[Kernel]]) -> list[dict[str, object]]:
    """Records of kernel, calls and us per iteration (means), the longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for kernel in (kernel for work in iterations for kernel in work):
        calls, us = sums.get(kernel.name, (0, 0.0))
        sums[kernel.name] = (calls + 1, us + kernel.us)
    count = len(iterations)
    rows = [{"kernel": name, "calls": calls / count, "us": us / count} for name, (calls, us) in sums.items()]
    return sorted(rows, key=lambda row: -row["us"])
