"""Times, peak memory and limits: GPU kernel time and wall time of one callable, and the ceilings of the device."""

import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

from dorac.bench import timeline

MIB = 2**20
WARM_UP = 3
WALL_SECONDS = {"cuda": 0.5, "cpu": 0.1}
WALL_REPEATS = (10, 300)  # fewest, most
TURN_SECONDS = 0.02

Callback = Callable[[], object]
# What a variant may fail by without ending the run.
CANNOT_RUN = (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches: a copy (bytes read plus written), a row sum (bytes read), a square matrix product."""

    copy_gb_per_s: float
    read_gb_per_s: float
    gemm_tflop_per_s: float

    def limit_us(self, *, flops: float, copied: float = 0, read: float = 0) -> float:
        """The longer of moving the bytes and doing the operations."""
        moving = copied / self.copy_gb_per_s + read / self.read_gb_per_s
        return max(moving * 1e-3, flops / self.gemm_tflop_per_s * 1e-6)


def measure(
    fn: Callback, device: torch.device, *, flush: bool = False, calls: int = 1, kernels: bool = False
) -> dict[str, object]:
    """Times ``fn``, which synchronises nothing and keeps nothing.

    Args:
        flush: overwrite the L2 cache before every iteration, as a small op meets it in a model.
        calls: how many calls lie between two wall clock readings; more than one for a ``fn`` of few microseconds.
        kernels: also return the kernels of an iteration, summed up by name.

    Returns:
        gpu_us: median over iterations of the summed times of kernels, copies and fills; None on the CPU.
        wall_us: median of the time between two CUDA events; on the CPU of ``time.perf_counter``.
        cpu_us: median time that the CPU takes to queue a call while the GPU is busy; None on the CPU. Where it exceeds
            gpu_us, the wall time is the CPU's.
        peak_mib: most memory allocated during one call beyond what was allocated before; None on the CPU.
        total_mib: the same with what was allocated before.
        kernels: records of name, calls and us per iteration, if asked for.
    """
    result = _alone(fn, device, flush=flush, calls=calls)
    (on_gpu,) = on_the_gpu([fn], device, flush=flush)
    if not kernels:
        on_gpu.pop("kernels", None)
    return result | on_gpu


def _alone(fn: Callback, device: torch.device, *, flush: bool, calls: int) -> dict[str, object]:
    """All of :func:`measure` but what the GPU does."""
    for _ in range(WARM_UP):
        fn()
    result = {"gpu_us": None, "wall_us": wall_us(fn, device, flush=flush, calls=calls), "cpu_us": cpu_us(fn, device)}
    peak, total = peak_mib(fn, device)
    return result | {"peak_mib": peak, "total_mib": total}


def on_the_gpu(fns: Sequence[Callback], device: torch.device, *, flush: bool = False) -> list[dict[str, object]]:
    """``gpu_us`` and ``kernels`` of each of ``fns``, which take turns; nothing on the CPU."""
    if device.type != "cuda" or not fns:
        return [{} for _ in fns]
    return [
        {
            "gpu_us": statistics.median(sum(kernel.us for kernel in work) for work in iterations),
            "kernels": timeline.by_name(iterations),
        }
        for iterations in timeline.gpu_iterations(fns, flush=flush)
    ]


def in_turns(fns: Sequence[Callback], device: torch.device, turns: int | None = None) -> list[dict[str, object]]:
    """:func:`on_the_gpu`, and in so many turns :func:`wall_in_turns`: ``turns_us`` and their median ``wall_us``.

    If their memory does not suffice together, why, for each in ``failed``.
    """
    steps = {i: _synchronized(fn, device) for i, fn in enumerate(fns)}
    try:
        times = wall_in_turns(steps, turns).values() if turns else ()
        wall = [{"wall_us": statistics.median(own), "turns_us": own} for own in times] or [{} for _ in fns]
        return [one | other for one, other in zip(wall, on_the_gpu(fns, device), strict=True)]
    except torch.OutOfMemoryError as error:
        reason = f"in turns, {_reason(error)}"
    return [{"failed": reason} for _ in fns]


def wall_in_turns(steps: Mapping[object, Callback], turns: int) -> dict[object, list[float]]:
    """Microseconds of each step, which synchronises, in every turn.

    In a turn every step is timed once, over about :data:`TURN_SECONDS` of it; the order is there and back.
    """
    gc.collect()
    gc.freeze()  # nobody pays for walking over what all of them hold
    try:
        repeats = {name: max(1, round(TURN_SECONDS / _seconds(step, 3))) for name, step in steps.items()}
        times: dict[object, list[float]] = {name: [] for name in steps}
        for turn in range(turns):
            for name in reversed(steps) if turn % 2 else steps:
                steps[name]()  # finds its compiled code again among the others'
                times[name].append(_seconds(steps[name], repeats[name]) * 1e6)
        return times
    finally:
        gc.unfreeze()


def _seconds(step: Callback, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def _synchronized(fn: Callback, device: torch.device) -> Callback:
    def step() -> None:
        fn()
        synchronize(device)

    return step


def attempt(make: Callable[[], Callback], device: torch.device, **how) -> dict[str, object]:
    """:func:`measure` of what ``make`` builds, from an empty compiler cache; see :func:`attempt_alone`."""
    release()
    return guarded(lambda: measure(make(), device, **how))


def attempt_alone(
    make: Callable[[], Callback],
    device: torch.device,
    *,
    flush: bool = False,
    calls: int = 1,
    failures: tuple[type[Exception], ...] = CANNOT_RUN,
) -> tuple[Callback | None, dict[str, object]]:
    """What ``make`` builds, and all of its :func:`measure` but what the GPU does; (None, why) if it cannot run.

    A variant that runs out of memory or that the compiler refuses, or that fails by another of ``failures``, gets a
    record of Nones and the reason in ``failed``; the run goes on and ends with exit code 1.
    """
    built = []

    def build_and_measure() -> dict[str, object]:
        built.append(make())
        return _alone(built[0], device, flush=flush, calls=calls)

    record = guarded(build_and_measure, failures)
    if "failed" not in record:
        return built[0], record
    built.clear()
    _free()
    return None, record


def guarded(
    run: Callable[[], dict[str, object]], failures: tuple[type[Exception], ...] = CANNOT_RUN
) -> dict[str, object]:
    """What ``run`` returns; a record of Nones and the reason in ``failed`` as in :func:`attempt_alone`."""
    try:
        return run()
    except failures as error:
        reason = _reason(error)
        if not isinstance(error, CANNOT_RUN):
            traceback.print_exc()
    # Outside of the handler, whose traceback keeps the tensors alive.
    _free()
    return {"gpu_us": None, "wall_us": None, "cpu_us": None, "peak_mib": None, "total_mib": None, "failed": reason}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def release() -> None:
    """Gives back compiled graphs and cached memory."""
    torch._dynamo.reset()
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def work_us(record: dict[str, object]) -> float | None:
    """The time that ratios are made of: GPU time, on the CPU wall time."""
    return record["wall_us"] if record["gpu_us"] is None else record["gpu_us"]


def against_limit(record: dict[str, object], limit_us: float) -> dict[str, object]:
    """The limit, and what fraction of the measured time it is."""
    us = work_us(record)
    return {"limit_us": limit_us, "fraction_of_limit": limit_us / us if us else None}


def wall_us(fn: Callback, device: torch.device, *, flush: bool, calls: int) -> float:
    """Median time of a call. On CUDA all iterations are queued at once, as ``triton.testing.do_bench`` does."""
    start = time.perf_counter()
    fn()
    synchronize(device)
    estimate = max((time.perf_counter() - start) * calls, 1e-6)
    repeats = min(max(int(WALL_SECONDS[device.type] / estimate), WALL_REPEATS[0]), WALL_REPEATS[1])
    if device.type == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times) / calls
    cache = timeline.flush_buffer() if flush else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        if cache is not None:
            cache.zero_()
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3 / calls


def cpu_us(fn: Callback, device: torch.device) -> float | None:
    """Median time that the CPU spends on a call, the GPU being kept busy so that it waits for nothing."""
    if device.type == "cpu":
        return None
    times = []
    for _ in range(WALL_REPEATS[0]):
        torch.cuda.synchronize()
        torch.cuda._sleep(timeline.PAUSE)
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_mib(fn: Callback, device: torch.device) -> tuple[float | None, float | None]:
    """Peak memory of one call in MiB: beyond what was allocated before, and in all. Nones on the CPU."""
    if device.type == "cpu":
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return (peak - before) / MIB, peak / MIB


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Times a copy of 1 GiB, a row sum over 1 GiB and an 8192^3 matrix product of random data; less on the CPU."""
    size, side = (2**30, 8192) if device.type == "cuda" else (16 * MIB, 512)
    elements = size // dtype.itemsize

    def seconds(fn: Callback) -> float:
        return work_us(measure(fn, device)) * 1e-6

    source = torch.randn(elements // 8192, 8192, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(lambda: target.copy_(source))
    read = size / seconds(lambda: source.sum(1, dtype=torch.float32))
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    gemm = 2 * side**3 / seconds(lambda: left @ right)
    return Ceilings(copy * 1e-9, max(read, copy) * 1e-9, gemm * 1e-12)  # torch's row sum can be slower than its copy


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
