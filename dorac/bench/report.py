"""What is printed, written and drawn: progress lines, plain text tables, JSON, bars."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import dorac

Record = dict[str, object]

PACKAGES = ("torch", "triton", "peft", "transformers", "bitsandbytes", "torchao")
# Kept in the JSON; the table shows what they lead to.
HIDDEN = (
    *("out", "in", "rank", "tokens", "phase", "factors", "layers", "hidden", "batch", "adapters"),
    *("bytes", "flops", "kernels", "saved", "saved_qkv", "saved_mlp", "turns_us"),
)
# Lists of records within a record, each printed as a table of its own under this heading.
DETAILS = {
    "kernels": "kernels of one iteration",
    "saved": "saved for backward, beyond parameters and input",
    "saved_qkv": "saved by q, k and v of one attention, with their input",
    "saved_mlp": "saved by one MLP, with its input",
}
WIDEST = 80  # characters of a cell; names of GPU kernels run to hundreds
PLOTTED = (
    ("gpu_ratio", "GPU time relative to compiled plain LoRA"),
    ("wall_ratio", "wall time relative to compiled plain LoRA"),
    ("fraction_of_limit", "fraction of the limit"),
)


def run_info(args: argparse.Namespace, argv: Sequence[str]) -> Record:
    """What a reader needs to judge the figures: device, versions, date, commit, arguments, ceilings."""
    return {
        "command": args.command,
        "argv": list(argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device_name(args.device),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"dorac": dorac.__version__, "python": platform.python_version(), "cuda": torch.version.cuda},
        "ceilings": vars(args.ceilings),
    }


def heading(info: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in info["ceilings"].items())
    return f"{info['command']} on {info['device']}\n{versions}\nceilings: {ceilings}\n"


def progress(record: Record) -> None:
    """One line per measurement on stderr, at once: a run of many minutes is followed."""
    shown = ("gpu_us", "wall_us", "queued_us", "cpu_us", "peak_mib", "saved_mib", "seconds", "failed")
    figures = "  ".join(f"{key} {_format(key, record[key])}" for key in shown if record.get(key) is not None)
    print(f"{record['case']:28} {record['variant']:26} {figures}", file=sys.stderr, flush=True)


def table(records: Sequence[Record]) -> str:
    """Aligned columns, one line per record, a blank line between cases. Columns that nobody filled are left out."""
    keys = dict.fromkeys(key for record in records for key in record if key not in HIDDEN)
    keys = [key for key in keys if any(record.get(key) is not None for record in records)]
    lines = [keys, *([_format(key, record.get(key)) for key in keys] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    numeric = [any(isinstance(record.get(key), int | float) for record in records) for key in keys]
    text = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    body = []
    for i, line in enumerate(text[1:]):
        if i and records[i].get("case") != records[i - 1].get("case"):
            body.append("")
        body.append(line)
    return "\n".join([text[0], *body])


def write_json(path: Path, info: Record, records: Sequence[Record], *, complete: bool = False) -> None:
    path.write_text(json.dumps(info | {"complete": complete, "records": records}, indent=1) + "\n", encoding="utf-8")


def save_plot(path: Path, info: Record, records: Sequence[Record]) -> None:
    """Bars per case, one colour per variant: the ratio to plain LoRA, or the fraction of the limit."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    key, label = next(
        (pair for pair in PLOTTED if any(record.get(pair[0]) is not None for record in records)), (None, None)
    )
    if key is None:
        print(f"{path} not drawn: no record has a ratio or a fraction of the limit", file=sys.stderr)
        return
    cases = list(dict.fromkeys(record["case"] for record in records))
    variants = list(dict.fromkeys(record["variant"] for record in records))
    figure = Figure(figsize=(max(7, 0.18 * len(cases) * len(variants) + 3), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width, colours = 0.85 / len(variants), colormaps["tab20"]
    for i, variant in enumerate(variants):
        chosen = [record for record in records if record["variant"] == variant and record.get(key) is not None]
        places = [cases.index(record["case"]) + (i - (len(variants) - 1) / 2) * width for record in chosen]
        axes.bar(places, [record[key] for record in chosen], width, label=variant, color=colours(i))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title=f"{info['command']}, {info['device']}", ylabel=label)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def _format(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.1e}"
            if "error" in key
            else f"{value:.1f}"
            if key.endswith(("us", "mib", "_s"))
            else f"{value:.3f}"
        )
    if isinstance(value, list):
        return " / ".join(f"{item:.4g}" for item in value)
    text = str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that dorac runs from, "-dirty" if it was changed; None where there is no git."""
    command = [
        "git",
        "-C",
        str(Path(dorac.__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
