"""What the kernels take of a card, asked of the compiler: no GPU is needed, but Triton not interpreted."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from dorac.bench.offline_compile import FULL, HALF, NAMES, Argument, Usage, compile_launch
from dorac.kernels import (
    backward,
    cast,
    compose,
    configs,
    dropout,
    faint,
    lora_b,
    mixed,
    mlp,
    mlp_backward,
    norm,
    packed_dense,
    packed_norm,
    segments,
    stack_norm,
)
from dorac.kernels.launch import Launch
from dorac.kernels.target import Target
from dorac.packed import Form

__all__ = ["EDGES", "KERNELS", "OF_RANK", "RANKS", "Cell", "Usage", "cells", "compile_launch", "refused"]

RANKS = 1, 16, 64, 128, 256, 384, 512
# Tokens, out and in: tiles end at the edges; they do not; nor do rows at multiples of 16: each number is loaded alone.
EDGES = {"even": (4096, 4096, 4096), "uneven": (4089, 4112, 4112), "odd": (4089, 4091, 4093)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A launch as a layer makes it, and the config that was chosen for it; None for kernels with but one."""

    kernel: str
    case: str
    config: configs.Config | None
    of: tuple[object, ...]  # what the config's shared memory depends on beside the card
    launch: Launch
    arguments: Sequence[Argument]

    def bound(self, target: Target) -> int | None:
        """Bytes of shared memory at most, by the config."""
        return None if self.config is None else self.config.shared_memory(target, *self.of)


def cells(
    target: Target,
    kernels: Iterable[str] | None = None,
    ranks: Iterable[int] = RANKS,
    edges: Iterable[str] = tuple(EDGES),
) -> Iterator[Cell]:
    """Every kernel with the config that the card has for it, by dtypes, rank and edges.

    ``kernels``: of :data:`KERNELS`; None for all that the card runs. ``edges``: of :data:`EDGES`.
    """
    for name in KERNELS if kernels is None else kernels:
        if name.startswith("packed") and configs.why_no_packed(target):
            continue
        for rank, edge in itertools.product(ranks if name in OF_RANK else (0,), edges):
            for dtypes, config, of, launch, arguments in KERNELS[name](target, rank, *EDGES[edge]):
                case = [dtypes, f"r{rank}" if rank else "", edge]
                yield Cell(name, " ".join(filter(None, case)), config, of, launch, arguments)


def refused(
    target: Target,
    kernels: Iterable[str] | None = None,
    ranks: Iterable[int] = RANKS,
    edges: Iterable[str] = tuple(EDGES),
) -> Iterator[Cell]:
    """What :func:`cells` would be on the same card with more shared memory: configs for which this one has too little.

    From the most memory downwards, so that each candidate of a chooser comes up that is before the one it takes.
    """
    for name in KERNELS if kernels is None else kernels:
        seen, memory = set(), 2**30
        while memory > target.shared_memory:
            found = [cell for cell in cells(target._replace(shared_memory=memory), [name], ranks, edges) if cell.config]
            found = [cell for cell in found if not configs.fits(cell.config, target, *cell.of)]
            for cell in found:
                if (cell.case, cell.config) not in seen:
                    seen.add((cell.case, cell.config))
                    yield cell
            memory = max((cell.bound(target) for cell in found), default=1) - 1


def _norm(target: Target, rank: int, _: int, out: int, inner: int) -> Iterator[tuple]:
    for dtype in (HALF, FULL):
        config = configs.norm_config(1, out, inner, rank, dtype, target)
        strides = (0, inner, 1), (0, inner, 1), (0, rank, 1)
        _, launch, _ = norm.norm_launches(1, out, inner, rank, strides, config)
        yield NAMES[dtype], config, (rank, dtype), launch, (dtype, dtype, dtype, 2.0, None, FULL)


def _packed_forms(target: Target, inner: int) -> Iterator[tuple[str, Form, tuple, int]]:
    """Of each format a name, the form, the dtypes of a weight's seven pieces, and how many of ``inner`` a row has."""
    byte, float8, groups = torch.uint8, torch.float8_e4m3fn, inner // 64 * 4
    of_blocks, whole = {"strides": (0, groups, 1, 0)}, inner // 64 * 64
    nf4 = Form("bnb_4bit", "bfloat16", 2, 32, 256, **of_blocks)
    yield nf4.name, nf4, (byte, FULL, byte, None, FULL, FULL, FULL), whole
    yield "number", Form("number", "bfloat16"), (torch.int8, None, FULL, None, None, None, None), inner
    yield "int4", Form("int4", "bfloat16", 2, 32, **of_blocks), (byte, None, HALF, HALF, None, None, None), whole
    yield "mxfp4", Form("mxfp4", "bfloat16", 2, 16, **of_blocks), (byte, None, byte, None, None, None, None), whole
    if configs.why_no_packed(target, float8=True) is None:
        number, nvfp4 = Form("number", "float16"), Form("nvfp4", "bfloat16", 2, 8, **of_blocks)
        yield "float8 float16", number, (float8, None, FULL, None, None, None, None), inner
        yield "nvfp4", nvfp4, (byte, None, float8, None, None, FULL, None), whole


def _packed_norm(target: Target, rank: int, _: int, out: int, inner: int) -> Iterator[tuple]:
    for name, form, pieces, length in _packed_forms(target, inner):
        config = configs.packed_norm_config(1, out, length, form.halves, rank, target)
        strides = 0, length, 1, 0, rank, 1
        _, launch, _ = packed_norm.packed_norm_launches(1, out, length // form.halves, rank, strides, form, config)
        yield name, config, (rank, HALF, form.halves), launch, (*pieces, HALF, HALF, 2.0, FULL)


def _packed_dense(target: Target, _: int, __: int, out: int, inner: int) -> Iterator[tuple]:
    for name, form, pieces, length in _packed_forms(target, inner):
        launch = packed_dense.packed_dense_launch(1, out, length // form.halves, 0, out, form)
        for dtype in (HALF, FULL):
            yield f"{name} {NAMES[dtype]}", None, (), launch, (*pieces, dtype)


def _up(target: Target, rank: int, tokens: int, out: int, _: int) -> Iterator[tuple]:
    for base, h in ((HALF, HALF), (HALF, FULL), (FULL, FULL)):
        config = configs.tile_config(tokens, out, rank, h, base, target)
        tile = config.block_t, config.block_o
        blocks = tile, (tile[0], config.block_r), (tile[1], config.block_r), tile, tile
        for descriptors in (False, True) if config.descriptors and not out % 8 else (False,):
            launch = compose.compose_launch(
                tokens,
                out,
                ((out, 1), (rank, 1), (rank, 1)),
                rank,
                config,
                has_norm=True,
                has_bias=False,
                delta=False,
                want_inner=True,
                split=base is not h,
                descriptors=descriptors,
            )
            matrices = (base, h, h, base, base)
            if descriptors:
                matrices = tuple(zip(matrices, blocks, strict=True))
            name = f"{NAMES[base]}/{NAMES[h]}{' TMA' * descriptors}"
            yield name, config, (h, base), launch, (*matrices[:3], FULL, FULL, 2.0, None, *matrices[3:])


def _compose(_: Target, __: int, tokens: int, out: int, ___: int) -> Iterator[tuple]:
    for dtype in (HALF, FULL):
        config, rows = configs.pointwise_config(tokens), (out, 1)
        flags = {"has_norm": True, "has_bias": False, "delta": False, "want_inner": True, "split": False}
        launch = compose.compose_launch(tokens, out, (rows, rows, None), None, config, **flags, descriptors=False)
        arguments = dtype, dtype, None, FULL, FULL, 2.0, None, dtype, dtype
        yield NAMES[dtype], config, (dtype, dtype), launch, arguments


def _backward(target: Target, _: int, tokens: int, out: int, __: int) -> Iterator[tuple]:
    for dtype in (HALF, FULL):
        config, rows = configs.column_config(tokens, out, dtype, target), (out, 1)
        flags = {"has_norm": True, "delta": False, "want_lora": True}
        _, launch, add = backward.compose_backward_launches(tokens, out, (rows, rows), config, **flags)
        yield NAMES[dtype], config, (dtype,), launch, (dtype, dtype, FULL, FULL, 2.0, dtype, dtype, FULL)
        yield f"{NAMES[dtype]} sum", None, (), add, (FULL, FULL, FULL)


def _lora_b_backward(target: Target, rank: int, tokens: int, out: int, inner: int) -> Iterator[tuple]:
    if rank > 384:  # the product is cuBLAS's
        return
    config, rows = configs.lora_b_config(tokens, out, rank, target), (out, 1)
    for of_y in (False, True):
        strides = rows, rows, (rank, 1), *(((inner, 1), (inner, 1), (rank, 1)) if of_y else ())
        _, launch, add = lora_b.lora_b_backward_launches(
            tokens, out, rank, strides, config, scale_b=True, in_features=inner if of_y else None
        )
        others = (HALF,) * 3 if of_y else (None,) * 3
        name = f"bf16{' y' * of_y}"
        yield name, config, (), launch, (HALF, HALF, HALF, FULL, FULL, HALF, 2.0, *others, HALF, FULL, FULL)
        if add is not None:
            yield f"{name} sum", None, (), add, (FULL, FULL, HALF, FULL, FULL, HALF, 2.0, *others, FULL, HALF)


def _mlp(target: Target, rank: int, tokens: int, features: int, _: int) -> Iterator[tuple]:
    for training in (False, True):
        config, of_b = configs.mlp_config(tokens, features, rank, training, target), (rank, 1)
        launch = mlp.mlp_launch(tokens, features, (rank, rank), (of_b, of_b), "silu", config, want_inner=training)
        low = (HALF, HALF, HALF) if config.block_r else (HALF, None, None)
        arguments = HALF, HALF, *low, FULL, FULL, None, FULL, FULL, None, 2.0, 2.0, HALF
        yield f"bf16{' training' * training}", config, (), launch, arguments


def _mlp_backward(target: Target, rank: int, tokens: int, features: int, _: int) -> Iterator[tuple]:
    config = configs.mlp_backward_config(tokens, features, rank, target)
    inside = bool(config.block_r)
    _, launch, add = mlp_backward.mlp_backward_launches(
        tokens, features, (rank,) * 3, (inside,) * 3, (False, False), "silu", config
    )
    of_layer, d_h, z = (FULL, FULL, None), HALF if inside else None, None if inside else HALF
    arguments = HALF, HALF, HALF, *of_layer, *of_layer, HALF, d_h, HALF, HALF, z, FULL
    yield "bf16", config, (), launch, arguments
    factors = (d_h,) * 3
    yield "bf16 sum", None, (), add, (FULL, FULL, FULL, 2.0, 2.0, FULL, FULL, None, None, *factors)


def _packed_faint(_: Target, rank: int, tokens: int, out: int, inner: int) -> Iterator[tuple]:
    columns = inner // 64
    form = Form("bnb_4bit", "bfloat16", 2, 32, 256, strides=(0, columns, 1, 0))
    launch = faint.finish_launch(tokens, out, 64 * columns, rank, 2, form, (out, 1), (rank, 1))
    pieces = torch.uint8, FULL, torch.uint8, None, FULL, FULL, FULL
    yield "bnb_4bit", None, (), launch, (FULL, FULL, HALF, FULL, FULL, HALF, 2.0, HALF, HALF, *pieces, FULL, HALF)


EXPERTS = 8
PAIRS = (HALF, HALF), (HALF, FULL), (FULL, FULL)  # of activations and factors


def _segment_compose(target: Target, rank: int, rows: int, out: int, _: int) -> Iterator[tuple]:
    for dtype, factor in PAIRS:
        config = configs.segment_tile_config(rows, EXPERTS, out, rank, factor, dtype, target)
        strides = (out, 1), (rank, 1), (out * rank, rank, 1)
        flags = {"delta": False, "split": dtype is not factor, "each": False}
        launch = segments.segment_compose_launch(rows, EXPERTS, out, rank, strides, config, **flags)
        arguments = factor, dtype, factor, FULL, FULL, 2.0, None, torch.int32, None, dtype, dtype
        yield f"{NAMES[dtype]}/{NAMES[factor]}", config, (factor, dtype), launch, arguments


def _segment_product(target: Target, rank: int, rows: int, _: int, inner: int) -> Iterator[tuple]:
    """lora_B's, whose columns are the longer side's, with and without g, and lora_A's."""
    of_a, of_b, no_g = (inner * rank, inner, 1), (inner * rank, 1, rank), (None, None)
    for dtype, factor in PAIRS:
        config = configs.segment_product_config(rows, EXPERTS, inner, rank, dtype, factor, target)
        flags = {"wide": factor is FULL, "each": False}
        for name, strides, of_g in (("", of_b, no_g), (" g", of_b, (FULL, FULL)), (" A", of_a, no_g)):
            both = (inner, 1), strides
            _, launch, _ = segments.segment_product_launches(rows, EXPERTS, inner, rank, both, config, **flags)
            arguments = dtype, factor, *of_g, 2.0, torch.int32, None, FULL
            yield f"{NAMES[dtype]}/{NAMES[factor]}{name}", config, (dtype, factor), launch, arguments


def _segment_backward(target: Target, rank: int, rows: int, out: int, _: int) -> Iterator[tuple]:
    """With magnitudes, and of lora_A's gradient without."""
    for (dtype, factor), magnitudes in itertools.product(PAIRS, (True, False)):
        config = configs.segment_backward_config(rows, out, rank, dtype, factor, target)
        of_b = (out * rank, rank, 1) if magnitudes else (out * rank, 1, out)
        strides = (out, 1), (out, 1) if magnitudes else (0, 0), (rank, 1), of_b
        flags = {"magnitudes": magnitudes, "delta": False, "wide": factor is FULL, "each": False}
        _, launch, add = segments.segment_backward_launches(rows, EXPERTS, out, rank, strides, config, **flags)
        given, m = (dtype, FULL, FULL) if magnitudes else (None,) * 3, FULL if magnitudes else None
        d_base = dtype if magnitudes else None
        arguments = dtype, dtype, *given, factor, 2.0, torch.int32, None, d_base, m, factor, None, m, FULL, None
        name = f"{NAMES[dtype]}/{NAMES[factor]}{' m' * magnitudes}"
        yield name, config, (dtype, factor), launch, arguments
        yield f"{name} sum", None, (), add, (FULL, m, None, torch.int32, m, factor, None)


def _gates() -> Iterator[tuple[str, tuple]]:
    """As Mixtral has them, and as GPT-OSS."""
    yield "halves", ("silu", False, None, 1.0, 0.0)
    yield "interleaved", ("silu", True, 7.0, 1.702, 1.0)


def _segment_gate(target: Target, rank: int, rows: int, features: int, _: int) -> Iterator[tuple]:
    for factor, (name, gate) in itertools.product((HALF, FULL), _gates()):
        config = configs.segment_gate_config(rows, EXPERTS, features, rank, factor, target)
        of_b, flags = (2 * features * rank, rank, 1), {"split": factor is FULL, "each": False}
        flags["stride_norm"] = 2 * features
        launch = segments.segment_gate_launch(rows, EXPERTS, features, rank, of_b, gate, config, **flags)
        bias = HALF if gate[1] else None
        for case, inner in ((name, HALF), (f"{name} inference", None)):
            arguments = factor, HALF, factor, FULL, FULL, 2.0, bias, torch.int32, inner, HALF
            yield f"bf16/{NAMES[factor]} {case}", config, (factor,), launch, arguments


def _segment_gate_backward(target: Target, rank: int, rows: int, features: int, _: int) -> Iterator[tuple]:
    for factor, (name, gate) in itertools.product((HALF, FULL), _gates()):
        config = configs.segment_gate_backward_config(rows, features, rank, factor, target)
        strides, flags = ((features, 1), (2 * features * rank, rank, 1)), {"wide": factor is FULL, "each": False}
        flags["stride_norm"] = 2 * features
        _, launch, _ = segments.segment_gate_backward_launches(
            rows, EXPERTS, features, rank, strides, gate, config, **flags
        )
        bias = HALF if gate[1] else None
        given, gradients = (HALF, HALF, FULL, FULL, bias, factor, 2.0, torch.int32), (HALF, FULL, factor, None)
        yield f"bf16/{NAMES[factor]} {name}", config, (factor,), launch, (*given, *gradients, FULL, FULL, None)


def _mixed(target: Target, rank: int, tokens: int, out: int, inner: int) -> Iterator[tuple]:
    batches = (1, 1), (32, 1), (256, 1), (tokens // 4, 1), (8, tokens // 8)  # single ones, counted, listed, long
    for dtype, factors in ((HALF, HALF), (HALF, FULL), (FULL, FULL)):
        for batch in batches:
            config = configs.mixed_config(*batch, 16, out, inner, rank, factors, dtype, target)
            strides = (inner, 1), (rank * inner, inner, 1), (out * rank, rank, 1), (out, out, 1)
            flags = {"has_bias": True, "want_inner": True, "rounds": False, "splits_products": factors is not dtype}
            _, down, up = mixed.mixed_launches(*batch, (16, out, inner, rank), strides, config, **flags)
            index, tiles = (torch.int64, torch.int64), torch.int32 if config.form in ("counted", "listed") else None
            name = f"{batch[0]}x{batch[1]} {NAMES[dtype]}/{NAMES[factors]}"
            yield f"{name} down", config, (factors, dtype), down, (dtype, factors, *index, tiles, FULL)
            vectors = FULL, FULL, FULL, dtype
            arguments = dtype, FULL, factors, *vectors, *index, tiles, dtype, dtype, factors
            yield f"{name} up", config, (factors, dtype), up, arguments


def _stack_norm(target: Target, rank: int, _: int, out: int, inner: int) -> Iterator[tuple]:
    if rank > 64:  # they are taken one after the other
        return
    for dtype in (HALF, FULL):
        config = configs.stack_norm_config(16, out, inner, rank, dtype, target)
        strides = (inner, 1), (rank * inner, inner, 1), (out * rank, rank, 1)
        _, launch, _ = stack_norm.stack_norm_launches(16, out, inner, rank, strides, config, each=True)
        yield NAMES[dtype], config, (dtype,), launch, (dtype, dtype, dtype, FULL, FULL)


def _small(_: Target, __: int, tokens: int, out: int, inner: int) -> Iterator[tuple]:
    yield "cast", None, (), cast.cast_launch(tokens, out), (FULL, FULL, HALF, HALF)
    yield "pack", None, (), dropout.pack_launch(tokens * out), (torch.uint8, torch.uint8)
    yield "drop", None, (), dropout.drop_launch(tokens * out), (HALF, torch.uint8, 2.0, HALF)
    strides = 0, inner, 1, 0, 16, 1
    yield "split", None, (), norm.split_launch(1, 16, inner, out, strides, 2), (FULL, FULL, HALF, HALF)
    strides = (0, inner, 1), (0, inner, 1), (0, 16, 1)
    split = configs.NormConfig(64, 64, 16, 2, 4, 2)
    yield "norm sum", None, (), norm.norm_launches(1, out, inner, 16, strides, split)[2], (FULL, FULL)


KERNELS: dict[str, Callable[[Target, int, int, int, int], Iterator[tuple]]] = {
    "norm": _norm,
    "packed-norm": _packed_norm,
    "packed-dense": _packed_dense,
    "up": _up,
    "compose": _compose,
    "backward": _backward,
    "lora-b-backward": _lora_b_backward,
    "mlp": _mlp,
    "mlp-backward": _mlp_backward,
    "packed-faint": _packed_faint,
    "mixed": _mixed,
    "stack-norm": _stack_norm,
    "segment-compose": _segment_compose,
    "segment-product": _segment_product,
    "segment-backward": _segment_backward,
    "segment-gate": _segment_gate,
    "segment-gate-backward": _segment_gate_backward,
    "small": _small,
}
OF_RANK = {*KERNELS} - {"packed-dense", "compose", "backward", "small"}
