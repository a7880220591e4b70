"""Steps of training and inference, and their ratios to plain LoRA."""

import functools
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from dorac.bench import measure, report

PLAIN_LORA = ("lora-sum", "lora-addmm")
_RATIOS = {"gpu": "gpu_us", "wall": "wall_us", "peak": "peak_mib"}


def measure_steps(
    case: str,
    variants: Mapping[str, tuple[Callable[[], nn.Module], dict[str, object] | None]],
    x: Tensor,
    dy: Tensor | None,
    *,
    micro_batches: int | None = None,
    calls: int = 1,
    kernels: Collection[str] = (),
) -> list[dict[str, object]]:
    """Measures a step of each variant: forward, and backward from ``dy`` unless that is None (inference).

    Wall time and memory are measured one variant after the other, GPU time in turns, so all of them are alive at once.

    Args:
        case: what the records are called.
        variants: by name, what builds the module and the arguments of ``torch.compile``; None runs it eagerly.
        micro_batches: a training step is so many forward and backward passes and a step of SGD, the cheapest there is
            (of length zero: the values stay). None: one forward and backward pass alone.
        calls: see :func:`measure.measure`. kernels: names of variants whose GPU kernels to list.

    Returns:
        A record of ``case``, ``variant``, what :func:`measure.measure` returns and, if the module was compiled,
        ``graph_breaks`` for each variant.
    """
    breaks = torch._dynamo.utils.counters["graph_break"]
    measure.release()
    steps, records = {}, {}
    # They share code, and each needs graphs of its own.
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        for name, (build, compile_args) in variants.items():
            make = functools.partial(_step, build, compile_args, x, dy, micro_batches)
            breaks.clear()
            steps[name], measured = measure.attempt_alone(make, x.device, calls=calls)
            records[name] = {"case": case, "variant": name} | measured
            if compile_args is not None:
                records[name]["graph_breaks"] = sum(breaks.values())
            report.progress(records[name])
        alive = {name: step for name, step in steps.items() if step is not None}
        on_the_gpu = measure.in_turns([*alive.values()], x.device)
    for name, measured in zip(alive, on_the_gpu, strict=True):
        if name not in kernels:
            measured.pop("kernels", None)
        records[name] |= measured
        if measured:
            report.progress(records[name])
    return [*records.values()]


def _step(build, compile_args, x, dy, micro_batches) -> measure.Callback:
    module = build().train(dy is not None)
    forward = module if compile_args is None else torch.compile(module, **compile_args)
    return _inference(forward, x) if dy is None else _training(module, forward, x, dy, micro_batches)


def _training(
    module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, micro_batches: int | None
) -> measure.Callback:
    leaf = x.detach().requires_grad_()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)

    def step() -> None:
        for _ in range(micro_batches or 1):
            forward(leaf).backward(dy)
            leaf.grad = None
        if micro_batches is not None:
            optimizer.step()
        for p in trained:
            p.grad = None

    return step


def _inference(forward: Callable[[Tensor], Tensor], x: Tensor) -> measure.Callback:
    @torch.no_grad()
    def step() -> None:
        forward(x)

    return step


def related_to_lora(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """The records of one case with their ratios to plain LoRA; None where it was not measured.

    ``gpu_ratio``, ``wall_ratio`` and ``peak_ratio`` divide by the compiled plain LoRA that takes the least GPU time (on
    the CPU the least wall time), ``gpu_ratio_eager`` and ``wall_ratio_eager`` of an eager variant by the eager one.
    """
    compiled, eager = (_fastest(records, mode) for mode in ("compiled", "eager"))
    related = []
    for record in records:
        ratios = {f"{what}_ratio": _ratio(record, compiled, key) for what, key in _RATIOS.items()}
        if record["variant"].endswith("-eager"):
            ratios |= {f"{what}_ratio_eager": _ratio(record, eager, _RATIOS[what]) for what in ("gpu", "wall")}
        related.append(record | ratios)
    return related


def _fastest(records: list[dict[str, object]], mode: str) -> dict[str, object] | None:
    names = [f"{formulation}-{mode}" for formulation in PLAIN_LORA]
    measured = [record for record in records if record["variant"] in names and measure.work_us(record) is not None]
    return min(measured, key=measure.work_us, default=None)


def _ratio(record: dict[str, object], reference: dict[str, object] | None, key: str) -> float | None:
    if reference is None or record.get(key) is None or not reference.get(key):
        return None
    return record[key] / reference[key]
