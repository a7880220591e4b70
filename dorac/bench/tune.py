"""``tune``: what the launch tables and the choice of the layer's form rest on; the chosen entries beside the others."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from dorac import functional
from dorac.bench import against_lora, measure, model, options, peers, report
from dorac.ops import eager, linear
from dorac.ops.linear_leaves import LORA_B_RANK

KERNELS = ("norm", "up", "backward", "lora-b-backward", "mlp", "mlp-backward", "form", "stack-form")
SEGMENTS = (  # asked for by name
    "segment-compose",
    "segment-product",
    "segment-backward",
    "segment-gate",
    "segment-gate-backward",
)
DEFAULTS = {
    "cuda": model.CUDA_STACK
    | {
        "shapes": [(8192, 8192), (14336, 4096)],
        "ranks": [16, 384],
        "tokens": 4096,
        "experts": 8,
        "kernels": list(KERNELS),
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_stack_arguments(parser)
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight of one layer")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="rows of the activations")
    parser.add_argument("--experts", type=options.positive, metavar="E", help="among whom segments are")
    parser.add_argument(
        "--kernels", nargs="+", choices=(*KERNELS, *SEGMENTS), help="what to sweep (default: all but segments)"
    )


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per candidate, the fastest first; ``chosen`` marks what the tables take."""
    sweeps = {
        "norm": _norm,
        "up": _up,
        "backward": _backward,
        "lora-b-backward": _lora_b_backward,
        "mlp": _mlp,
        "mlp-backward": _mlp_backward,
        "form": _form,
    }
    of_a_layer = [kernel for kernel in args.kernels if kernel in sweeps]
    for kernel, (out_features, in_features), rank in itertools.product(of_a_layer, args.shapes, args.ranks):
        layer = peers.draw_layer(peers.draw_weight(out_features, in_features, args), rank, args)
        yield from sweeps[kernel](layer, args)
    for shape, rank in itertools.product(args.shapes, args.ranks) if {*SEGMENTS} & {*args.kernels} else ():
        from dorac.bench import tune_segments

        yield from tune_segments.sweep(shape, rank, args)
    for rank in args.ranks if "stack-form" in args.kernels else ():
        yield from _stack_form(rank, args)


def _norm(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    from dorac.kernels import configs, norm, target

    scaling = torch.full((), peers.SCALING, device=args.device)
    factors = layer.lora_A, layer.lora_B, scaling
    split = norm.needs_split(layer.weight.dtype, layer.lora_A.dtype)
    rank = 3 * layer.rank if split else layer.rank
    chosen = configs.norm_config(1, *layer.weight.shape, rank, layer.weight.dtype, target.of_device(args.device))
    candidates = [
        dataclasses.replace(
            chosen, block_o=block_o, block_i=block_i, splits=splits, warps=warps, stages=stages, registers=registers
        )
        for (block_o, block_i), splits, (warps, registers), stages in itertools.product(
            ((64, 64), (128, 64), (64, 128)), (1, 2, 4), ((4, False), (8, False), (8, True)), (2, 3)
        )
    ]
    of = rank, layer.weight.dtype
    return _sweep(
        "norm", layer, chosen, candidates, of, lambda c: lambda: norm.row_norm(layer.weight, *factors, c), args
    )


def _up(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    from dorac.kernels import compose, configs, target

    base, h, norm, scaling = _activations(layer, args)
    chosen = configs.tile_config(*base.shape, layer.rank, h.dtype, base.dtype, target.of_device(args.device))
    candidates = [
        configs.TileConfig(block_t, block_o, min(chosen.block_r, 64), warps, stages, descriptors)
        for block_t, block_o, warps, stages, descriptors in itertools.product(
            (32, 64, 128), (128, 256), (4, 8), (3,), (False, True)
        )
    ]
    if layer.rank <= chosen.block_r:
        candidates += [
            configs.TileConfig(*tile, chosen.block_r, warps, stages, rows=rows)
            for tile, rows, warps, stages in itertools.product(
                ((16, 128), (32, 128), (64, 128), (64, 64)), (128, 256, 512), (4, 8), (3, 4)
            )
        ]

    def call(config):
        tensors = base, h, layer.lora_B, layer.magnitude, norm, scaling, None
        return lambda: compose.compose(*tensors, want_inner=True, config=config)

    return _sweep("up", layer, chosen, candidates, (h.dtype, base.dtype), call, args)


def _backward(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    from dorac.kernels import backward, configs, target

    inner, _, norm, _ = _activations(layer, args)
    dy = torch.randn_like(inner)
    chosen = configs.column_config(*inner.shape, inner.dtype, target.of_device(args.device))
    candidates = [
        configs.ColumnConfig(block_t, block_o, rows, warps, stages)
        for block_t, block_o, rows, warps, stages in itertools.product(
            (16, 32), (128, 256), (64, 128, 256), (4, 8), (2, 4)
        )
    ]

    def call(config):
        return lambda: backward.compose_backward(dy, inner, layer.magnitude, norm, config=config)

    return _sweep("backward", layer, chosen, candidates, (inner.dtype,), call, args)


def _with_products(chosen, rows: tuple[int, ...], stages: tuple[int, ...]) -> list[object]:
    """Candidates for a backward pass that takes products along."""
    return [
        dataclasses.replace(chosen, block_t=block_t, block_o=block_o, rows=rows, warps=warps, stages=stages)
        for block_t, block_o, rows, warps, stages in itertools.product((16, 32, 64), (64, 128), rows, (4, 8), stages)
    ]


def _lora_b_backward(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    """Also the pass without lora_B's gradient and that product alone, which it has to beat."""
    from dorac.kernels import backward, configs, lora_b, target

    if layer.rank > LORA_B_RANK:
        return []
    inner, h, norm, scaling = _activations(layer, args)
    dy = torch.randn_like(inner)
    chosen = configs.lora_b_config(*inner.shape, layer.rank, target.of_device(args.device))
    candidates = _with_products(chosen, rows=(1024, 2048, 4096), stages=(3, 4))

    def call(config):
        tensors = dy, inner, layer.magnitude, norm, h, scaling
        return lambda: lora_b.lora_b_backward(*tensors, h_is_scaled=True, config=config)

    def apart():
        d_inner, _, _ = backward.compose_backward(dy, inner, layer.magnitude, norm)
        return d_inner.T @ h

    records = list(_sweep("lora-b-backward", layer, chosen, candidates, (), call, args))
    return [*records, _record("lora-b-backward", layer, "two kernels", apart, args)]


def _mlp(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    """What joins the layers of an MLP, all three of this rank, ``layer`` being its gate and up, in training.

    Each candidate with what it leaves to cuBLAS: with ``block_r = 0`` the up-projections of both.
    """
    from dorac.kernels import configs, mlp, target

    up, h_up, norm, _ = _activations(layer, args)
    gate, h, z, ranks = (
        torch.randn_like(up),
        torch.cat([h_up, h_up], 1).to(up.dtype),
        torch.empty_like(up),
        (layer.rank,) * 2,
    )
    b = layer.lora_B.to(up.dtype)
    chosen = configs.mlp_config(*up.shape, layer.rank, True, target.of_device(args.device))
    candidates = [
        configs.MlpConfig(*tile, rows, warps, stages)
        for tile in ((8, 256), (16, 256), (32, 128))
        for rows, warps, stages in itertools.product((32, 256), (4, 8), (1, 3))
    ]
    candidates += [
        configs.MlpConfig(block_t, block_o, rows, warps, stages, min(64, max(16, chosen.block_r)))
        for block_t, block_o, rows, warps, stages in itertools.product(
            (16, 32), (64, 128), (128, 256, 512), (4, 8), (3, 4)
        )
    ]

    def call(config):
        launch = mlp.mlp_launch(*up.shape, ranks, (b.stride(),) * 2, "silu", config, want_inner=True)
        of_layer = layer.magnitude, norm, None

        def run():
            if not config.block_r:
                for inner, columns in zip((gate, up), h.split(ranks, 1), strict=True):
                    inner.addmm_(columns, b.t(), alpha=peers.SCALING)
            launch(up, gate, h, b, b, *of_layer, *of_layer, peers.SCALING, peers.SCALING, z)

        return run

    return _sweep("mlp", layer, chosen, candidates, (), call, args)


def _mlp_backward(layer: peers.Layer, args: argparse.Namespace) -> Iterable[dict[str, object]]:
    """The way back, each candidate with the products that it leaves to cuBLAS."""
    from dorac.kernels import configs, target
    from dorac.kernels.mlp_backward import mlp_backward_launches

    up, h_up, norm, _ = _activations(layer, args)
    rank, ranks = layer.rank, (layer.rank,) * 3
    gate, dz, d_gate = torch.randn_like(up), torch.randn_like(up), torch.empty_like(up)
    h_up = h_up.to(up.dtype)
    h, a = torch.cat([h_up, h_up], 1), torch.randn(rank, up.shape[1], dtype=up.dtype, device=up.device)
    d_a, d_b = torch.empty_like(a), torch.empty_like(a).t().contiguous()
    d_m = torch.empty_like(layer.magnitude)
    chosen = configs.mlp_backward_config(*up.shape, rank, target.of_device(args.device))
    candidates = [
        configs.MlpBackwardConfig(block_t, block_o, rows, warps, stages)
        for block_t, block_o, rows, warps, stages in itertools.product((16, 32), (128, 256), (256,), (4, 8), (2, 3, 4))
    ]
    if rank <= 128:
        block_r = max(16, 1 << (rank - 1).bit_length())
        candidates += [
            configs.MlpBackwardConfig(block_t, block_o, rows, warps, 3, block_r)
            for block_t, block_o, rows, warps in itertools.product((16, 32), (64, 128), (1024, 2048, 4096), (4, 8))
        ]

    def call(config):
        inside = bool(config.block_r)
        shape, launch, add = mlp_backward_launches(*up.shape, ranks, (inside,) * 3, (False, False), "silu", config)
        parts = torch.empty(shape, device=up.device)
        of_layer = layer.magnitude, norm, None
        d_up, z = (dz, None) if inside else (torch.empty_like(up), dz)

        def run():
            torch.mm(h_up, a, out=dz)
            low = (h, h_up) if inside else (h, None)
            launch(dz, up, gate, *of_layer, *of_layer, *low, d_gate, d_up, z, parts)
            of_factors = (d_b, d_b, d_a) if inside else (None,) * 3
            add(parts, norm, norm, peers.SCALING, peers.SCALING, d_m, d_m, None, None, *of_factors)
            if not inside:
                return d_gate.t() @ h_up, d_up.t() @ h_up, h_up.t() @ z

        return run

    return _sweep("mlp-backward", layer, chosen, candidates, (), call, args)


def _form(layer: peers.Layer, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The layer's forms (:func:`dorac.ops.linear.route`), eager and compiled, trained and not."""
    x = torch.randn(args.tokens, layer.weight.shape[1], dtype=args.dtype, device=args.device)
    for phase, compile_args in itertools.product(options.PHASES, (None, {"fullgraph": True, "dynamic": False})):
        dy = x.new_empty(args.tokens, layer.weight.shape[0]).normal_() if phase == "train" else None
        case = f"form {phase} {'eager' if compile_args is None else 'compiled'} {_shape(layer)}"
        yield from _forms(case, functools.partial(peers.DoracOnce, layer), compile_args, x, dy, layer.lora_A)


def _stack_form(rank: int, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The same for a whole compiled stack, where what follows a layer takes g along."""
    stack = model.build_stack(args)
    layers = model.draw_layers(model.linear_weights(stack), rank, args)
    x = torch.randn(1, args.tokens, args.hidden, dtype=args.dtype, device=args.device)
    lora_A = next(iter(layers.values())).lora_A
    build = functools.partial(model.adapt, stack, layers, peers.DoracOnce)
    for phase in options.PHASES:
        dy = torch.randn_like(x) if phase == "train" else None
        yield from _forms(f"stack-form {phase} r{rank}", build, model.COMPILE, x, dy, lora_A)


def _forms(
    case: str,
    build: Callable[[], nn.Module],
    compile_args: dict[str, object] | None,
    x: Tensor,
    dy: Tensor | None,
    lora_A: Tensor,
) -> Iterator[dict[str, object]]:
    """Each form from an empty compiler cache: all of them are the same code."""
    chosen = linear.route(x.flatten(0, -2), lora_A, training=dy is not None, traced=compile_args is not None)
    for form in ("accumulate", "fused", "separate") if x.dtype is lora_A.dtype else ("fused", "separate"):
        eager.forget_plans()
        with mock.patch.object(linear, "route", lambda *_, form=form, **__: form):
            (record,) = against_lora.measure_steps(case, {form: (build, compile_args)}, x, dy)
        yield record | {"chosen": form == chosen}
    eager.forget_plans()


def _activations(layer: peers.Layer, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base ``[T, O]``, h ``[T, R]``, the norm and the scaling."""
    out_features = layer.weight.shape[0]
    base = torch.randn(args.tokens, out_features, dtype=args.dtype, device=args.device)
    h = torch.randn(args.tokens, layer.rank, dtype=args.adapter_dtype, device=args.device)
    norm = functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, peers.SCALING)
    return base, h, norm, torch.full((), peers.SCALING, device=args.device)


def _sweep(
    kernel: str,
    layer: peers.Layer,
    chosen: object,
    candidates: list[object],
    of: tuple[object, ...],
    call: Callable[[object], measure.Callback],
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    """Every candidate that fits the GPU (:func:`dorac.kernels.configs.fits`, with ``of``), the fastest first."""
    from dorac.kernels import configs, target
    from dorac.kernels.launch import LaunchError

    records = []
    for config in {chosen: None} | dict.fromkeys(candidates):
        if not configs.fits(config, target.of_device(args.device), *of):
            continue
        try:
            record = _record(kernel, layer, str(config), call(config), args)
        except LaunchError:  # registers
            continue
        records.append(record | {"chosen": config == chosen})
    return sorted(records, key=lambda record: record["wall_us"])


def _record(kernel: str, layer: peers.Layer, name: str, fn: measure.Callback, args) -> dict[str, object]:
    from triton.testing import do_bench

    us = do_bench(fn, warmup=5, rep=20, return_mode="median") * 1e3
    record = {"case": f"{kernel} {_shape(layer)}", "variant": name, "wall_us": us}
    report.progress(record)
    return record


def _shape(layer: peers.Layer) -> str:
    out_features, in_features = layer.weight.shape
    return f"{out_features}x{in_features} r{layer.rank}"
