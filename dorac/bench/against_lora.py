"""Steps of training and inference, and their ratios to plain LoRA."""

import argparse
import functools
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dorac.bench import measure, report

PLAIN_LORA = ("lora-sum", "lora-addmm")
PEFT_LORA = "peft-lora"
LORA_FUSED = "lora-fused"
SECOND_PRODUCTS = "second-products"
BASE_PRODUCTS = "base-products"
_RATIOS = {"gpu": "gpu_us", "wall": "wall_us", "peak": "peak_mib"}


def measure_steps(
    case: str,
    variants: Mapping[str, tuple[Callable[[], nn.Module], dict[str, object] | None]],
    x: Tensor,
    dy: Tensor | None,
    *,
    micro_batches: int | None = None,
    calls: int = 1,
    turns: int | None = None,
    autocast: bool = False,
    kernels: Collection[str] = (),
    beside: Mapping[str, Callable[[], measure.Callback]] | None = None,
    failures: tuple[type[Exception], ...] = measure.CANNOT_RUN,
) -> list[dict[str, object]]:
    """Measures a step of each variant: forward, and backward from ``dy`` unless that is None (inference).

    Memory, and without ``turns`` wall time, are measured one variant after the other, GPU time in turns, so all of them
    are alive at once.

    Args:
        case: what the records are called.
        variants: by name, what builds the module and the arguments of ``torch.compile``; None runs it eagerly.
        micro_batches: a training step is so many forward and backward passes and a step of SGD, the cheapest there is
            (of length zero: the values stay). None: one forward and backward pass alone.
        calls: see :func:`measure.measure`. kernels: names of variants whose GPU kernels to list.
        turns: ``wall_us`` is of synchronised steps in so many of :func:`measure.wall_in_turns`, which ``turns_us``
            lists; what it is otherwise, of steps queued one after the other, is ``queued_us``.
        autocast: forward runs under bfloat16 autocast.
        beside: what makes further steps, by name, measured as the variants are.
        failures: see :func:`measure.attempt_alone`.

    Returns:
        A record of ``case``, ``variant``, what :func:`measure.measure` returns and, if the module was compiled,
        ``graph_breaks`` for each variant.
    """
    breaks = torch._dynamo.utils.counters["graph_break"]
    measure.release()
    steps, records = {}, {}
    # They share code, and each needs graphs of its own.
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        makers = {
            name: functools.partial(_step, *how, x, dy, micro_batches, autocast) for name, how in variants.items()
        }
        for name, make in (makers | dict(beside or {})).items():
            breaks.clear()
            steps[name], measured = measure.attempt_alone(make, x.device, calls=calls, failures=failures)
            if turns:
                measured |= {"queued_us": measured["wall_us"], "wall_us": None}
            records[name] = {"case": case, "variant": name} | measured
            if name in variants and variants[name][1] is not None:
                records[name]["graph_breaks"] = sum(breaks.values())
            report.progress(records[name])
        alive = {name: step for name, step in steps.items() if step is not None}
        together = measure.in_turns([*alive.values()], x.device, turns)
    for name, measured in zip(alive, together, strict=True):
        if name not in kernels:
            measured.pop("kernels", None)
        records[name] |= measured
        if measured:
            report.progress(records[name])
    return [*records.values()]


def products(weights: Iterable[Tensor], x: Tensor, forwards: int = 1, backwards: int = 1) -> measure.Callback:
    """So many products with every weight in either direction.

    One in each is the least that PEFT's meaning of dropout takes beside LoRA.
    """
    weights, tokens = [*weights], x.numel() // x.shape[-1]
    rows = {features: x.new_empty(tokens, features).normal_() for w in weights for features in w.shape}
    operands = [(w, *(rows[features] for features in w.shape)) for w in weights]

    @torch.no_grad()
    def step() -> None:
        for weight, dy, rows in operands:
            for _ in range(forwards):
                F.linear(rows, weight)
            for _ in range(backwards):
                torch.mm(dy, weight)

    return step


def beside(
    weights: Iterable[Tensor], x: Tensor, args: argparse.Namespace, phase: str
) -> dict[str, Callable[[], measure.Callback]]:
    """The second :func:`products` where there is dropout."""
    if not args.dropout or phase != "train":
        return {}
    return {SECOND_PRODUCTS: functools.partial(products, weights, x)}


def _step(build, compile_args, x, dy, micro_batches, autocast) -> measure.Callback:
    module = build().train(dy is not None)
    forward = module if compile_args is None else torch.compile(module, **compile_args)
    forward = _under_autocast(forward, x.device) if autocast else forward
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


def _under_autocast(forward: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    def cast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(x)

    return cast


def related_to_lora(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """The records of one case with their ratios to plain LoRA; None where it was not measured.

    ``gpu_ratio``, ``wall_ratio`` and ``peak_ratio`` divide by the compiled plain LoRA that takes the least GPU time (on
    the CPU the least wall time), ``gpu_ratio_eager`` and so on of an eager variant by the eager one. ``gpu_peft``,
    ``wall_peft`` and ``peak_peft`` divide by PEFT's LoRA in the same mode, where that is among the variants,
    ``gpu_fused`` and so on by fused plain LoRA. With a record of :data:`SECOND_PRODUCTS`, ``gpu_ratio_second`` and
    ``wall_ratio_second`` divide by the time of the plain LoRA in the same mode and theirs. Of wall times measured in
    turns a ratio is the median of the turns' ratios.
    """
    named = {record["variant"]: record for record in records}
    products = named.get(SECOND_PRODUCTS)
    compiled, eager = (_fastest(records, mode) for mode in ("compiled", "eager"))
    related = []
    for record in records:
        ratios = {f"{what}_ratio": _ratio(record, compiled, key) for what, key in _RATIOS.items()}
        mode = record["variant"].rpartition("-")[2]
        if mode == "eager":
            ratios |= {f"{what}_ratio_eager": _ratio(record, eager, key) for what, key in _RATIOS.items()}
        if peft := named.get(f"{PEFT_LORA}-{mode}"):
            ratios |= {f"{what}_peft": _ratio(record, peft, key) for what, key in _RATIOS.items()}
        if fused := named.get(f"{LORA_FUSED}-{mode}"):
            ratios |= {f"{what}_fused": _ratio(record, fused, key) for what, key in _RATIOS.items()}
        if products:
            lora = eager if mode == "eager" else compiled
            ratios |= {
                f"{what}_ratio_second": _ratio(record, lora, _RATIOS[what], products) for what in ("gpu", "wall")
            }
        related.append(record | ratios)
    return related


def _fastest(records: list[dict[str, object]], mode: str) -> dict[str, object] | None:
    names = [f"{formulation}-{mode}" for formulation in PLAIN_LORA]
    measured = [record for record in records if record["variant"] in names and measure.work_us(record) is not None]
    return min(measured, key=measure.work_us, default=None)


def _ratio(record: dict[str, object], reference: dict[str, object] | None, key: str, *more: dict) -> float | None:
    """To the sum of the reference and ``more``."""
    times = (record, reference, *more)
    if reference is None or any(one.get(key) is None for one in times) or not reference[key]:
        return None
    in_turns = key == "wall_us" and all("turns_us" in one for one in times)
    rows = zip(*(one["turns_us"] if in_turns else [one[key]] for one in times), strict=True)
    return statistics.median(own / sum(others) for own, *others in rows)
