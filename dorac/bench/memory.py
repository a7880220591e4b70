"""``memory``: peak memory of a training step and what is saved for backward, relative to plain LoRA."""

import argparse
import collections
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dorac.bench import against_lora, measure, model, options, report
from dorac.bench.measure import MIB
from dorac.nn import DoraLayer, blocks, norm_cache, shared

_VARIANTS = (
    *("lora-sum-compiled", "lora-addmm-compiled", "dorac-every-compiled", "dorac-cached-compiled"),
    *("lora-sum-eager", "lora-addmm-eager", "dorac-every-eager", "dorac-cached-eager", "peft-dora-eager"),
    *("lora-fused-eager", "dorac-fused-eager", "dorac-fused-cached-eager"),
)
DEFAULTS = {
    device: {
        name: value for name, value in defaults.items() if name not in ("phases", "micro_batches", "turns", "dropout")
    }
    | {"variants": list(_VARIANTS)}
    for device, defaults in model.DEFAULTS.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_stack_arguments(parser)
    model.add_size_arguments(parser)
    options.add_variants(parser, model.VARIANTS)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per rank and variant of forward and backward of the stack.

    ``peak_mib``: most memory allocated beyond what was allocated before. ``saved_mib``: what forward leaves for
    backward beyond parameters, buffers and the input, listed in ``saved``; of an eager variant ``saved_qkv`` and
    ``saved_mlp`` list it for the projections of one attention and for one MLP by themselves, with their input.
    ``peak_ratio`` and ``saved_ratio`` divide by the plain LoRA, compiled or eager as the variant, that takes least,
    ``peak_fused`` and ``saved_fused`` of an eager variant by fused plain LoRA.
    """
    stack = model.build_stack(args)
    weights = model.linear_weights(stack)
    x = torch.randn(args.batch, args.tokens, args.hidden, dtype=args.dtype, device=args.device)
    dy = torch.randn_like(x)
    for rank in args.ranks:
        layers = model.draw_layers(weights, rank, args)
        size = {"layers": args.layers, "hidden": args.hidden, "rank": rank, "tokens": args.tokens, "batch": args.batch}
        records = []
        for name in args.variants:
            build = functools.partial(model.build_variant, stack, layers, name)
            measured = measure_memory(build, model.compile_args(name), x, dy)
            records.append({"case": f"r{rank}", "variant": name} | size | measured)
            report.progress(records[-1])
        yield from related_to_lora(records)


def measure_memory(
    build: Callable[[], nn.Module], compile_args: dict[str, object] | None, x: Tensor, dy: Tensor
) -> dict[str, object]:
    """Peak and saved tensors of forward and backward of what ``build`` returns, from an empty compiler cache."""
    measure.release()
    module = build().train()
    forward = module if compile_args is None else torch.compile(module, **compile_args)
    leaf = x.detach().requires_grad_()
    parameters = list(module.parameters())

    def step() -> None:
        forward(leaf).backward(dy)
        for tensor in (leaf, *parameters):
            tensor.grad = None

    for _ in range(measure.WARM_UP):
        step()
    norms = [norm_cache.kept_norm(m) for m in module.modules() if isinstance(m, DoraLayer)]
    held = [*parameters, *module.buffers(), *(norm for norm in norms if norm is not None)]
    saved = saved_for_backward(lambda: forward(leaf), [leaf, *held])
    of_blocks = {} if compile_args is not None else saved_by_blocks(module, leaf, held)
    peak, total = peak_mib(step, x.device)
    return {
        "peak_mib": peak,
        "total_mib": total,
        "saved_mib": sum(t.untyped_storage().nbytes() for t in saved) / MIB,
        "saved": by_shape(saved),
        **of_blocks,
    }


def saved_by_blocks(stack: model.Stack, x: Tensor, held: list[Tensor]) -> dict[str, list[dict[str, object]]]:
    """What the projections of the first layer's attention, and its MLP, keep for backward, their input included."""
    layer = stack.llama.layers[0]
    attention = layer.self_attn
    projections = attention.q_proj, attention.k_proj, attention.v_proj

    def project() -> list[Tensor]:
        with shared.together(projections) if blocks.is_fused(attention) else contextlib.nullcontext():
            return [layer(x) for layer in projections]

    parts = {"saved_qkv": project, "saved_mlp": lambda: layer.mlp(x)}
    return {name: by_shape(saved_for_backward(run, held)) for name, run in parts.items()}


def saved_for_backward(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that autograd keeps while the result of ``forward`` lives, one per storage that ``held`` has not.

    Compiled functions are seen too: what their graphs save goes through the same hooks.
    """
    known = {t.untyped_storage().data_ptr() for t in held}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known and pointer not in saved:
            saved[pointer] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return list(saved.values())


def by_shape(tensors: Iterable[Tensor]) -> list[dict[str, object]]:
    """Records of tensor (dtype and shape), count and mib, the largest sum first."""
    groups = collections.defaultdict(list)
    for tensor in tensors:
        groups[f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"].append(tensor)
    rows = [
        {"tensor": name, "count": len(group), "mib": sum(t.untyped_storage().nbytes() for t in group) / MIB}
        for name, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["mib"])


def peak_mib(fn: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """As :func:`measure.peak_mib`, and on the CPU from the profiler's record of every allocation; no total there."""
    if device.type == "cuda":
        return measure.peak_mib(fn, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return peak_of(events) / MIB, None


def peak_of(events: list[dict]) -> int:
    """The most bytes at once by the allocations and releases of a chrome trace."""
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def related_to_lora(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """The records of one rank with their ratios to the least of plain LoRA in the same mode, and to the fused one."""
    related = []
    for record in records:
        mode = record["variant"].rpartition("-")[2]
        names = [f"{name}-{mode}" for name in against_lora.PLAIN_LORA]
        loras = [other for other in records if other["variant"] in names]
        ratios = {}
        fused = [other for other in records if other["variant"] == f"{against_lora.LORA_FUSED}-{mode}"]
        for what in ("peak", "saved"):
            for ratio, others in (("ratio", loras), ("fused", fused)):
                least = min((other[f"{what}_mib"] for other in others), default=None)
                ratios[f"{what}_{ratio}"] = record[f"{what}_mib"] / least if least else None
        related.append(record | ratios)
    return related
