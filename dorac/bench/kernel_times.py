"""What ``card --times`` measures: the kernels as layers call them, beside another card's configs and beside aten."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dorac import functional, packed
from dorac.bench import compose, measure, peers, report
from dorac.kernels import configs
from dorac.kernels.target import Target
from dorac.ops import cards
from dorac.ops.linear_leaves import LORA_B_RANK

# Tokens, out and in; hidden and inner features of the MLP.
SIZES = {"cuda": (4096, 8192, 8192, 4096, 14336), "cpu": (16, 64, 128, 64, 96)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and what it moves (bytes copied, bytes read) and computes."""

    name: str
    call: Callable[[], object]
    copied: int = 0
    read: int = 0
    flops: int = 0
    packed: bool = False


def run(own: Target | None, other: Target | None, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per case and who computes it: "chosen", the card's own configs; those of ``other``; aten.

    ``ratio``: of the time, to that of the own configs. ``fraction_of_limit``: the time that the device's ceilings
    leave, as a share of the measured one. On the CPU, where there is aten alone, wall time.
    """
    for rank in args.ranks:
        for case in _cases(rank, args):
            variants = {
                name: card
                for name, card in (("chosen", own), (f"as {other.name}" if other else "", other))
                if card is not None and not (configs.why_no_packed(card) if case.packed else configs.why_not(card))
            } | {"aten": None}
            fns = [_for(card, case.call) for card in variants.values()]
            for fn in fns:  # compiles
                fn()
            if args.device.type == "cuda":
                measured = measure.on_the_gpu(fns, args.device, flush=True)
            else:
                measured = [{"wall_us": measure.wall_us(fn, args.device, flush=False, calls=1)} for fn in fns]
            limit = args.ceilings.limit_us(flops=case.flops, copied=case.copied, read=case.read)
            for name, record in zip(variants, measured, strict=True):
                times = {"gpu_us": record.get("gpu_us"), "wall_us": record.get("wall_us")}
                first = measure.work_us({"gpu_us": None, "wall_us": None} | measured[0])
                us = measure.work_us(times)
                record = {"case": f"{case.name} r{rank}", "variant": name} | times
                record |= {"ratio": us / first} | measure.against_limit(times, limit)
                report.progress(record)
                yield record


def _for(card: Target | None, call: Callable[[], object]) -> Callable[[], object]:
    def launch() -> None:
        with cards.launched_for(card):
            call()

    return launch


def _cases(rank: int, args: argparse.Namespace) -> Iterator[Case]:
    tokens, out, inner_features, hidden, inner_mlp = SIZES[args.device.type]
    layer = peers.draw_layer(peers.draw_weight(out, inner_features, args), rank, args)
    factors = layer.lora_A, layer.lora_B, peers.SCALING
    low_rank = 2 * rank
    yield Case(
        "norm",
        lambda: functional.norm_factored(layer.weight, *factors),
        read=layer.weight.nbytes,
        flops=low_rank * out * inner_features,
    )
    weight = _nf4(out, inner_features, args)
    yield Case(
        "packed-norm",
        lambda: functional.norm_factored(weight, *factors),
        read=weight.codes.nbytes + weight.absmax.nbytes,
        flops=low_rank * out * inner_features,
        packed=True,
    )
    inputs = compose.draw_inputs(tokens, out, rank, args)
    activation, product = inputs.base.nbytes, low_rank * tokens * out
    yield Case("up", lambda: compose.up_compose_forward(inputs), copied=3 * activation, flops=product)
    yield Case("compose", lambda: compose.compose_forward(inputs), copied=4 * activation)
    yield Case("backward", lambda: compose.scale_backward(inputs), copied=3 * activation)
    if rank <= LORA_B_RANK:
        with_b = functools.partial(compose.lora_b_backward, inputs)
        yield Case("lora-b-backward", with_b, copied=3 * activation, flops=product)
    # Each of the three frozen layers: its product and that with its gradient; six with the factors.
    flops = 3 * 2 * tokens * (2 * hidden * inner_mlp + 3 * rank * (hidden + inner_mlp))
    yield Case("mlp step", _mlp_step(tokens, hidden, inner_mlp, rank, args), flops=flops)


def _nf4(out: int, inner: int, args: argparse.Namespace) -> packed.Bnb4bit:
    codes = torch.randint(256, (out * inner // 2, 1), dtype=torch.uint8, device=args.device)
    absmax = torch.rand(out * inner // 64, device=args.device) + 0.5
    table = torch.linspace(-1, 1, 16, device=args.device)
    return packed.Bnb4bit(codes, absmax, table, None, None, None, (out, inner), args.dtype, 64, 0)


def _mlp_step(tokens: int, hidden: int, inner: int, rank: int, args: argparse.Namespace) -> Callable[[], Tensor]:
    """Forward and backward of a SwiGLU block with norms that are known."""
    x = torch.randn(tokens, hidden, dtype=args.dtype, device=args.device, requires_grad=True)
    projections = []
    for out_features, in_features in ((inner, hidden), (inner, hidden), (hidden, inner)):
        layer = peers.draw_layer(peers.draw_weight(out_features, in_features, args), rank, args)
        norm = functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, peers.SCALING)
        trained = (t.requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
        projections.append(functional.Projection(layer.weight, *trained, weight_norm=norm, scaling=peers.SCALING))
    dy, trained = torch.randn_like(x), [t for p in projections for t in (p.lora_A, p.lora_B, p.magnitude)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.dora_mlp(x, *projections), [x, *trained], dy)

    return step
