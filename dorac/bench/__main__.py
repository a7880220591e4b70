"""The benchmark from the command line to the exit code.

A subcommand is a module with

- ``DEFAULTS``: per device type that it runs on, a value for each of its options that the user leaves out;
- ``add_arguments(parser)``: its own options, each with the default None;
- where it needs one, ``check(args)``: raises ``BadInput`` for options that do not go together;
- ``run(args)``: yields (or returns a list of) records, one dict per measurement, with at least ``case`` (what was
  measured, such as "8192x8192 r16") and ``variant`` (who was measured). The other keys become columns.

``picture`` measures nothing: it draws what records of these have.
"""

import sys
from types import ModuleType

import torch

from dorac.cli import BadInput

try:
    from dorac.bench import (
        card,
        compose,
        decode,
        experts,
        host,
        layer,
        measure,
        memory,
        mesh,
        mixed,
        model,
        norm,
        options,
        picture,
        report,
        scale,
        surgery,
        tune,
    )
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    print('python -m dorac.bench: error: the benchmark needs triton: pip install "dorac[bench]"', file=sys.stderr)
    raise SystemExit(2) from None

SUBCOMMANDS: dict[str, ModuleType] = {
    "norm": norm,
    "compose": compose,
    "layer": layer,
    "mixed": mixed,
    "model": model,
    "decode": decode,
    "experts": experts,
    "memory": memory,
    "host": host,
    "scale": scale,
    "surgery": surgery,
    "mesh": mesh,
    "tune": tune,
    "card": card,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand: 0 if everything was measured, 1 if a variant failed, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["picture"]:  # measures nothing
            return picture.main(argv[1:])
        return run(options.parse(argv, SUBCOMMANDS), argv)
    except BadInput as error:
        print(f"python -m dorac.bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def run(args, argv: list[str]) -> int:
    """Measures and reports. The JSON file is rewritten after every record: a run cut short keeps what it has."""
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    torch.manual_seed(args.seed)
    args.ceilings = measure.measure_ceilings(args.device, args.dtype)
    run_info = report.run_info(args, argv)
    shown = not getattr(args, "silent", False)  # where several processes run this, one shows
    if shown:
        print(report.heading(run_info), flush=True)
    records = []
    # A graph compiled earlier, by another version of the library, is not what is to be measured.
    with torch.compiler.config.patch(force_disable_caches=True):
        for record in SUBCOMMANDS[args.command].run(args):
            records.append(record)
            if args.json is not None:
                report.write_json(args.json, run_info, records)
    if shown:
        print(report.table(records))
    for record in records:
        for key, title in report.DETAILS.items():
            if record.get(key):
                print(f"\n{record['case']} {record['variant']}: {title}")
                print(report.table(record[key]))
    if args.json is not None:
        report.write_json(args.json, run_info, records, complete=True)
    if args.plot is not None:
        report.save_plot(args.plot, run_info, records)
    failures = [record for record in records if record.get("failed")]
    for record in failures:
        print(f"FAILED: {record['case']} {record['variant']}: {record['failed']}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
