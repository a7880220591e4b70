"""``card``: which kernels a card runs, with which config and how much of its shared memory, or aten and why."""

import argparse
from collections.abc import Iterator

from dorac.bench import options
from dorac.cli import BadInput
from dorac.kernels import configs, target
from dorac.ops import front

DEFAULTS = {
    "cpu": {"ranks": [16, 64, 384], "target": None, "processors": None, "compile": False, "times": False},
    "cuda": {"ranks": [16, 64, 384], "target": None, "processors": None, "compile": False, "times": False},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=list(target.CARDS), help="another card than the device, known by name")
    parser.add_argument("--processors", type=options.positive, metavar="N", help="as if the card had so many")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument(
        "--compile", action="store_true", default=None, help="also ask Triton's compiler, which takes a minute or two"
    )
    parser.add_argument(
        "--times",
        action="store_true",
        default=None,
        help="also time the kernels on this device, beside aten and, with --target or --processors, with the configs "
        "of that card",
    )


def check(args: argparse.Namespace) -> None:
    if args.compile:
        import triton

        if triton.knobs.runtime.interpret:
            raise BadInput("--compile needs kernels that are not interpreted: unset TRITON_INTERPRET")
    if args.times and args.device.type == "cuda":
        card, own = _card(args), target.of_device(args.device)
        if card.backend != own.backend or card.shared_memory > own.shared_memory:
            raise BadInput(f"--times: kernels for {card.name} cannot be launched on {own.name}")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per kernel, dtypes and rank: ``bound_kib``, by the config, of the card's ``limit_kib``.

    With ``--compile`` also what the compiler says: ``shared_kib``, ``registers`` of a thread, and its ``spills``. With
    ``--times`` records of :func:`dorac.bench.kernel_times.run` follow.
    """
    card = _card(args)
    yield from _configs(card, args)
    if args.times:
        from dorac.bench import kernel_times

        own = target.of_device(args.device) if args.device.type == "cuda" else None
        yield from kernel_times.run(own, None if card == own or own is None else card, args)


def _configs(card: target.Target | None, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    if card is None:
        yield {"case": str(args.device), "variant": "aten", "why": "there is no GPU (--target names one)"}
        return
    why = front.why_aten(args.device) if args.target is None else configs.why_not(card)
    if why is not None:
        yield {"case": card.name, "variant": "aten", "why": why}
        return
    for case, float8 in (("packed weights", False), ("packed weights in float8", True)):
        if (why := configs.why_no_packed(card, float8)) is not None:
            yield {"case": case, "variant": "aten", "why": why}
            break
    from dorac.bench import offline

    for cell in offline.cells(card, ranks=args.ranks, edges=("even",)):
        if cell.config is None and not args.compile:
            continue  # a kernel with one way to launch it
        bound = cell.bound(card)
        record = {
            "case": f"{cell.kernel} {cell.case}",
            "variant": "one config" if cell.config is None else _short(cell.config),
            "bound_kib": None if bound is None else bound / 1024,
            "limit_kib": card.shared_memory / 1024,
        }
        if args.compile:
            usage = offline.compile_launch(cell.launch, cell.arguments, card)
            record |= {"shared_kib": usage.shared / 1024, "registers": usage.registers, "spills": usage.spills}
        yield record


def _card(args: argparse.Namespace) -> target.Target | None:
    card = target.of_device(args.device) if args.device.type == "cuda" else None
    if args.target is not None:
        card = target.CARDS[args.target]
    return card if card is None or args.processors is None else card._replace(processors=args.processors)


def _short(config: configs.Config) -> str:
    """The fields that are set, without the record's name."""
    return " ".join(f"{key}={value}" for key, value in vars(config).items() if value)
