"""What one callable does on the GPU, kernel by kernel, from the profiler's timeline."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

PROFILED = 20
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


def gpu_iterations(fn: Callable[[], object], *, flush: bool) -> list[list[Kernel]]:
    """What each of ``PROFILED`` iterations does on the GPU, which idles before each, so that all see the same clocks.

    Otherwise whoever keeps the GPU waiting for the CPU is rewarded with a cooler chip. The flush is not counted.
    """
    cache = flush_buffer() if flush else None

    def iterate(times: int) -> None:
        for _ in range(times):
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
            for times in (1, PROFILED):
                iterate(times)
                profiler.step()
        return split_iterations(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], PROFILED)


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
