"""``surgery``: seconds of the calls that go over a whole model, by its number of tiny layers, and how they grow."""

import argparse
import contextlib
import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

import dorac
from dorac.bench import options, report
from dorac.bench.report import Record

SIZE = 8  # features of a layer
NAMES = ["up", "down"]
CALLS = ("apply", "save", "load", "cache", "merge", "unmerge", "peft-build", "peft-enable", "peft-build-enabled")
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
STEPS = 5
ROUNDS = 5  # of a model of few layers; a call is timed as the median
DEFAULTS = {"cpu": {"targets": [100, 1000, 10_000], "step_targets": 1000, "variants": list(CALLS)}}


class Block(nn.Module):
    """Two linear layers of 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, SIZE)
        self.down = nn.Linear(SIZE, SIZE)


def build(targets: int) -> nn.Module:
    """A model of so many layers to adapt, two to a block."""
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(math.ceil(targets / 2)))
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="+", type=options.positive, metavar="N", help="layers of the models")
    parser.add_argument("--step-targets", type=options.positive, metavar="N", help="layers, for the optimizer's step")
    options.add_variants(parser, CALLS)


def run(args: argparse.Namespace) -> Iterator[Record]:
    """One record per size and call, with the exponent of the growth of each call, then one of AdamW's step each way.

    ``seconds`` is wall time, ``cpu_seconds`` that of the process, which other work on the machine hardly lengthens; the
    exponent and the ratio of the steps are of that.

    ``peft-build`` is stock PEFT's ``get_peft_model``, ``peft-build-enabled`` the same call after
    ``dorac.peft.enable()``, ``peft-enable`` ``dorac.peft.enable(model)`` of a model that stock PEFT has built.
    """
    _seconds(2, args.variants)  # whatever is imported at the first call
    seconds: dict[str, list[tuple[int, float]]] = {name: [] for name in args.variants}  # the CPU's, by size
    for targets in args.targets:
        rounds = [_seconds(targets, args.variants) for _ in range(max(1, min(ROUNDS, 2000 // targets)))]
        for name in args.variants:
            times = {key: statistics.median(calls[name][key] for calls in rounds) for key in CLOCKS}
            seconds[name].append((targets, times["cpu_seconds"]))
            record = {"case": f"{targets} targets", "variant": name} | times
            report.progress(record)
            yield record
    for name, points in seconds.items():
        yield {"case": "growth", "variant": name, "exponent": exponent(points)}
    yield from _steps(args.step_targets)


def exponent(points: list[tuple[int, float]]) -> float | None:
    """k of the least squares fit ``seconds = c * targets^k``; None for a single size."""
    sizes, times = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(sizes, times).slope if len(set(sizes)) > 1 else None


def _now() -> dict[str, float]:
    return {name: clock() for name, clock in CLOCKS.items()}


def _since(start: dict[str, float]) -> dict[str, float]:
    return {name: now - start[name] for name, now in _now().items()}


def _seconds(targets: int, names: list[str]) -> dict[str, dict[str, float]]:
    """The times of each call, on one model of so many layers, in an order in which each can run."""
    times: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        gc.collect()
        start = _now()
        result = call()
        times[name] = _since(start)
        return result

    model, other = build(targets), build(targets)
    timed("apply", lambda: dorac.apply_dora(model, NAMES, init_lora_weights=False))
    with tempfile.TemporaryDirectory() as directory:
        timed("save", lambda: dorac.save_adapter(model, directory))
        timed("load", lambda: dorac.load_adapter(other, directory))
    timed("cache", lambda: dorac.cache_norms(model)).remove()
    timed("merge", lambda: dorac.merge(model))
    timed("unmerge", lambda: dorac.unmerge(model))
    if any("peft" in name for name in names):
        _time_peft(targets, timed)
    return times


def _time_peft(targets: int, timed: Callable[[str, Callable[[], object]], object]) -> None:
    import peft

    import dorac.peft

    def wrap(model: nn.Module) -> nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=NAMES, use_dora=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plain module has no config, says PEFT
        plain = build(targets)
        stock = timed("peft-build", lambda: wrap(plain))
        timed("peft-enable", lambda: dorac.peft.enable(stock))
        dorac.peft.disable(stock)
        plain = build(targets)
        with dorac.peft.enable():
            timed("peft-build-enabled", lambda: wrap(plain))


def _steps(targets: int) -> Iterator[Record]:
    """AdamW's step over the adapters, without cached norms and with them."""
    plain = None
    for name in ("step", "step-cached"):
        model = build(targets)
        dorac.apply_dora(model, NAMES, init_lora_weights=False)
        with dorac.cache_norms(model) if name == "step-cached" else contextlib.nullcontext():
            times = step_seconds(model)
        plain = plain or times["cpu_seconds"]
        record = {"case": f"optimizer, {targets} targets", "variant": name} | times
        report.progress(record)
        yield record | {"step_ratio": times["cpu_seconds"] / plain}


def step_seconds(model: nn.Module) -> dict[str, float]:
    """The median times of five steps of AdamW at its defaults, after a first one that makes its state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    times = []
    for _ in range(1 + STEPS):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        start = _now()
        optimizer.step()
        times.append(_since(start))
    return {name: statistics.median(step[name] for step in times[1:]) for name in CLOCKS}
