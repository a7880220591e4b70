"""The launch tables of rows sorted by segment: the chosen entries beside others, for ``tune``."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch

from dorac.bench import experts, report
from dorac.bench.peers import SCALING
from dorac.functional import Gate
from dorac.kernels import configs, segments, target
from dorac.kernels.launch import LaunchError


def sweep(shape: tuple[int, int], rank: int, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per kernel and candidate that fits, the fastest first, over ``args.tokens`` rows sent at random."""
    count, rows, (out_features, in_features) = args.experts, args.tokens, shape
    layer = experts.Experts(count, *shape, rank, args)
    offsets = experts.draw_offsets(rows, count, "random", args.device)
    of_layer = layer.magnitude.detach(), layer.norm
    x, base, dy = (
        torch.randn(rows, n, dtype=args.dtype, device=args.device) for n in (in_features, *(out_features,) * 2)
    )
    h = torch.randn(rows, rank, dtype=args.adapter_dtype, device=args.device)
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    card, dtypes = target.of_device(args.device), (base.dtype, h.dtype)
    inner, d_a = torch.randn_like(base), torch.empty_like(lora_A)

    tile = configs.segment_tile_config(rows, count, out_features, rank, h.dtype, base.dtype, card)
    tiles = [
        configs.TileConfig(*of_tile, tile.block_r, warps, 2, rows=walked)
        for of_tile, walked, warps in itertools.product(
            ((16, 128), (16, 256), (32, 128), (64, 128)), (0, 128, 256), (4, 8)
        )
    ]
    down = configs.segment_product_config(rows, count, in_features, rank, *dtypes, card)
    up = configs.segment_product_config(rows, count, out_features, rank, *dtypes, card)
    products = [
        dataclasses.replace(down, block_t=block_t, block_i=block_i, splits=splits, stages=stages)
        for (block_t, block_i), splits, stages in itertools.product(
            ((16, 128), (16, 256), (32, 128), (64, 64), (64, 128)), (1, 2, 4, 8), (3, 5)
        )
    ]

    def strips(length: int) -> tuple[configs.SegmentConfig, list[configs.SegmentConfig]]:
        chosen = configs.segment_backward_config(rows, length, rank, *dtypes, card)
        return chosen, [
            dataclasses.replace(chosen, block_t=block_t, block_o=block_o, rows=walked, warps=warps, stages=stages)
            for block_t, block_o, walked, warps, stages in itertools.product(
                (16, 32, 64), (64, 128), (128, 1024, 4096), (4, 8), (3,)
            )
        ]

    def composed(want_inner: bool):
        return lambda config: (
            lambda: segments.segment_compose(
                base, h, lora_B, *of_layer, SCALING, None, offsets, want_inner=want_inner, config=config
            )
        )

    def product(rows_x, factor):
        return lambda config: lambda: segments.segment_product(rows_x, factor, offsets, config=config)

    def backward(config):
        return lambda: segments.segment_backward(dy, inner, *of_layer, h, SCALING, offsets, config=config)

    def outer(config):
        return lambda: segments.segment_backward(x, None, None, None, h, 1.0, offsets, d_lora_B=d_a.mT, config=config)

    sweeps = {
        "segment-compose": (tile, tiles, (h.dtype, base.dtype), composed(False)),
        "segment-compose inner": (tile, tiles, (h.dtype, base.dtype), composed(True)),
        "segment-product down": (down, products, dtypes, product(x, lora_A)),
        "segment-product d_h": (up, products, dtypes, product(dy, lora_B.mT)),
        "segment-backward": (*strips(out_features), dtypes, backward),
        "segment-backward d_lora_A": (*strips(in_features), dtypes, outer),
    }
    if base.dtype is torch.bfloat16:
        sweeps |= _gates(base, h, lora_B, *of_layer, offsets, card)
    for name, (chosen, candidates, of, call) in sweeps.items():
        if name.partition(" ")[0] not in args.kernels:
            continue
        case = f"{name} {count}x{out_features}x{in_features} r{rank} {rows} rows"
        records = [
            record | {"chosen": config == chosen}
            for config in {chosen: None} | dict.fromkeys(candidates)
            if configs.fits(config, card, *of) and (record := _timed(case, config, call(config)))
        ]
        yield from sorted(records, key=lambda record: record["wall_us"])


def _gates(base, h, lora_B, magnitude, norm, offsets, card) -> dict[str, tuple]:
    """Of the layer as gate and up in one: Mixtral's, and GPT-OSS'."""
    (rows, out_features), (count, _, rank) = base.shape, lora_B.shape
    features, dz, sweeps = out_features // 2, base[:, : out_features // 2].contiguous(), {}
    ahead = configs.segment_gate_config(rows, count, features, rank, h.dtype, card)
    tiles = [
        dataclasses.replace(ahead, block_t=block_t, block_o=block_f, warps=warps, rows=walked)
        for block_t, block_f, warps, walked in itertools.product((16, 32), (64, 128), (4, 8), (0, 64, 128, 256))
    ]
    back = configs.segment_gate_backward_config(rows, features, rank, h.dtype, card)
    strips = [
        dataclasses.replace(back, block_t=block_t, block_o=block_f, warps=warps, rows=walked)
        for block_t, block_f, warps, walked in itertools.product((16, 32), (32, 64, 128), (4, 8), (128, 512, 2048))
    ]
    for name, gate in (("halves", Gate()), ("interleaved", Gate(interleaved=True, limit=7.0, alpha=1.702, shift=1.0))):
        of_gate = dataclasses.astuple(gate)

        def forward(config, of_gate=of_gate):
            layer = base, h, lora_B, magnitude, norm, SCALING, None, offsets, of_gate
            return lambda: segments.segment_gate(*layer, want_inner=True, config=config)

        def backward(config, of_gate=of_gate):
            layer = dz, base, magnitude, norm, None, h, SCALING, offsets, lora_B, of_gate
            return lambda: segments.segment_gate_backward(*layer, config=config)

        sweeps[f"segment-gate {name}"] = ahead, tiles, (h.dtype,), forward
        sweeps[f"segment-gate-backward {name}"] = back, strips, (h.dtype,), backward
    return sweeps


def _timed(case: str, config: configs.Config, fn: Callable[[], object]) -> dict[str, object] | None:
    from triton.testing import do_bench

    try:
        us = do_bench(fn, warmup=2, rep=10, return_mode="median") * 1e3
    except LaunchError:  # registers
        return None
    record = {"case": case, "variant": str(config), "wall_us": us}
    report.progress(record)
    return record
