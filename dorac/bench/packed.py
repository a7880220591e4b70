"""``packed``: the row norm read from packed weights, beside that of a dense copy which is made first."""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dorac import cli, functional, packed
from dorac.bench import measure, norm, options, peers, report

NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


def _packed(weight: packed.Packed, lora_A: Tensor, lora_B: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.norm_factored(weight, lora_A, lora_B, peers.SCALING)


def _rows(weight: packed.Packed, lora_A: Tensor, lora_B: Tensor) -> Callable[[], Tensor]:
    """A dense copy in plain aten."""
    return lambda: functional.norm_factored(weight.rows(0, weight.shape[0]), lora_A, lora_B, peers.SCALING)


def _bitsandbytes(weight: packed.Packed, lora_A: Tensor, lora_B: Tensor) -> Callable[[], Tensor]:
    """A dense copy by the library's own kernels."""
    from bitsandbytes import functional as library

    if isinstance(weight, packed.BnbInt8):
        return lambda: functional.norm_factored(
            library.int8_vectorwise_dequant(weight.codes, weight.scale), lora_A, lora_B, peers.SCALING
        )
    nested = None
    if weight.nested_code is not None:
        nested = library.QuantState(
            weight.nested_absmax, code=weight.nested_code, blocksize=weight.nested_blocksize, dtype=torch.float32
        )
    state = library.QuantState(
        weight.absmax,
        torch.Size(weight.shape),
        weight.code,
        weight.blocksize,
        "nf4",
        weight.dtype,
        weight.nested_offset,
        nested,
    )
    return lambda: functional.norm_factored(library.dequantize_4bit(weight.codes, state), lora_A, lora_B, peers.SCALING)


VARIANTS = {"packed": _packed, "rows": _rows, "bitsandbytes": _bitsandbytes}
FORMATS = ("nf4", "nf4-nested", "int8", "float8-row", "float8-block", "int4", "mxfp4", "nvfp4")
OF_BITSANDBYTES = FORMATS[:3]
DEFAULTS = {
    "cuda": {"shapes": [(8192, 8192), (4096, 14336)], "ranks": [16, 64], "formats": list(FORMATS)},
    "cpu": {"shapes": [(256, 256)], "ranks": [8], "formats": list(FORMATS)},
}
for _defaults in DEFAULTS.values():
    _defaults["variants"] = ["packed", "rows"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the factors")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, metavar="NAME", help=f"of the weight, of: {', '.join(FORMATS)}"
    )
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    """Raises BadInput for columns that are no whole blocks, and for packages that are missing."""
    for _, in_features in args.shapes:
        if in_features % 64:
            raise cli.BadInput(f"--shapes: in must be a multiple of 64, the columns of a block, got {in_features}")
    if "bitsandbytes" in args.variants and importlib.util.find_spec("bitsandbytes") is None:
        raise cli.BadInput("--variants bitsandbytes needs the package: pip install bitsandbytes")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per format, shape, rank and variant.

    bytes: one read of the packed weight, with its scales; of every variant, so that the fraction of the limit compares.
    flops: ``2 * out * in * r``. Every variant runs without gradients, from a flushed L2 cache.
    """
    for name, shape, rank in itertools.product(args.formats, args.shapes, args.ranks):
        weight = draw(name, shape, args)
        dense = weight.rows(0, shape[0])
        layer = peers.draw_layer(dense, rank, args)
        truth, factors = norm.true_norm(layer), (layer.lora_A, layer.lora_B)
        del dense, layer
        moved = sum(piece.nbytes for piece in weight if isinstance(piece, Tensor))
        flops = 2 * shape[0] * shape[1] * rank
        for variant in args.variants:
            if variant == "bitsandbytes" and name not in OF_BITSANDBYTES:
                continue
            measured = _measure(variant, weight, factors, truth, args)
            limit = args.ceilings.limit_us(flops=flops, read=moved)
            record = {"case": f"{name} {shape[0]}x{shape[1]} r{rank}", "variant": variant, "bytes": moved}
            record |= {"flops": flops} | measured | measure.against_limit(measured, limit)
            report.progress(record)
            yield record


def _measure(
    variant: str, weight: packed.Packed, factors: tuple[Tensor, Tensor], truth: Tensor, args: argparse.Namespace
) -> dict[str, object]:
    errors = {}

    def make() -> measure.Callback:
        take = VARIANTS[variant](weight, *factors)
        errors["relative_error"] = norm.relative_error(take(), truth)
        return take

    return measure.attempt(make, args.device, flush=True, kernels=args.profile) | errors


def draw(name: str, shape: tuple[int, int], args: argparse.Namespace) -> packed.Packed:
    """A weight of random bytes, about as large as one that keeps the variance of its input."""
    out_features, in_features = shape
    size, on = in_features**-0.5, {"device": args.device}

    def scales(*grid: int) -> Tensor:
        return size * (0.5 + torch.rand(*grid, **on))

    def numbers(*grid: int) -> Tensor:
        return torch.randint(0, 256, grid, dtype=torch.uint8, **on)

    if name == "int8":
        return packed.BnbInt8(numbers(*shape).view(torch.int8), scales(out_features), shape, torch.float32)
    if name.startswith("float8"):
        rows, columns = (128, 128) if name == "float8-block" else (1, in_features)
        codes = torch.randn(*shape, **on).to(torch.float8_e4m3fn)
        grid = -(-out_features // rows), -(-in_features // columns)
        return packed.Scaled8bit(codes, scales(*grid), None, shape, torch.float32, rows, columns)
    codes = numbers(out_features, in_features // 2)
    if name == "int4":
        scale, zero = scales(in_features // 64, out_features).to(args.dtype), scales(in_features // 64, out_features)
        return packed.TorchaoInt4(codes, scale, zero.to(args.dtype), shape, args.dtype, 64)
    if name == "mxfp4":
        exponents = torch.full((out_features, in_features // 32), 120, dtype=torch.uint8, **on)
        return packed.Mxfp4(codes, exponents, shape, args.dtype)
    if name == "nvfp4":
        scale = (0.5 + torch.rand(out_features, in_features // 16, **on)).to(torch.float8_e4m3fn)
        return packed.Nvfp4(codes, scale, torch.tensor(size, **on), shape, args.dtype, 0)
    table, blocks = torch.tensor(NF4, **on), out_features * in_features // 64
    pieces = codes.view(-1, 1), scales(blocks), table, None, None, None
    if name == "nf4-nested":
        nested = torch.linspace(-1, 1, 256, **on), 0.3 * scales(-(-blocks // 256)), torch.tensor(size, **on)
        pieces = codes.view(-1, 1), numbers(blocks), table, *nested
    return packed.Bnb4bit(*pieces, shape, args.dtype, 64, 256 if name == "nf4-nested" else 0)
