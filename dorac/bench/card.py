"""``card``: which kernels a card runs, with which config and how much of its shared memory, or aten and why."""

import argparse
from collections.abc import Iterator

from dorac.bench import options
from dorac.cli import BadInput
from dorac.kernels import configs, target

DEFAULTS = {
    "cpu": {"ranks": [16, 64, 384], "target": None, "compile": False},
    "cuda": {"ranks": [16, 64, 384], "target": None, "compile": False},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=list(target.CARDS), help="another card than the device, known by name")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument(
        "--compile", action="store_true", default=None, help="also ask Triton's compiler, which takes a minute or two"
    )


def check(args: argparse.Namespace) -> None:
    if args.compile:
        import triton

        if triton.knobs.runtime.interpret:
            raise BadInput("--compile needs kernels that are not interpreted: unset TRITON_INTERPRET")


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per kernel, dtypes and rank: ``bound_kib``, by the config, of the card's ``limit_kib``.

    With ``--compile`` also what the compiler says: ``shared_kib``, ``registers`` of a thread, and its ``spills``.
    """
    card = _card(args)
    if card is None:
        yield {"case": str(args.device), "variant": "aten", "why": "there is no GPU (--target names one)"}
        return
    why = configs.why_not(card)
    if why is not None:
        yield {"case": card.name, "variant": "aten", "why": why}
        return
    if configs.why_no_packed(card) is not None:
        yield {"case": "packed weights", "variant": "aten", "why": configs.why_no_packed(card)}
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
    if args.target is not None:
        return target.CARDS[args.target]
    return target.of_device(args.device) if args.device.type == "cuda" else None


def _short(config: configs.Config) -> str:
    """The fields that are set, without the record's name."""
    return " ".join(f"{key}={value}" for key, value in vars(config).items() if value)
