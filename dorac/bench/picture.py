"""``picture``: README's picture of what dorac costs beside PEFT, drawn from the records in ``results/``."""

import argparse
import io
import json
from pathlib import Path
from typing import NamedTuple

from dorac import cli
from dorac.cli import BadInput

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent / "pictures"


class Row(NamedTuple):
    """One line of a panel: a case of a record, and who is drawn of it."""

    label: str
    record: str
    case: str
    drawn: tuple[str, ...]
    marked: str | None = None  # drawn as a line across the bar


# The keys of a record hold the ratio to PEFT's LoRA, the median of ratios within turns.
TIMES = {"GPU time": ("gpu_peft",), "wall time": ("wall_peft", "peft_ratio")}
STOCK, FUSED, LAYER, BLOCKS = "peft-dora-eager", "dorac-fused-cached-eager", "dorac-cached-eager", "lora-fused-eager"
NAMES = {STOCK: "PEFT's DoRA", FUSED: "dorac", LAYER: "dorac"}
PANELS = {
    "4 Llama layers, 4096 tokens": (
        Row("train", "h200-fused-r16.json", "r16 train, autocast, save-outputs", (STOCK, FUSED), BLOCKS),
        Row(
            "train, checkpointing",
            "h200-fused-r16-checkpointing.json",
            "r16 train, autocast, checkpointing, save-outputs",
            (STOCK, FUSED),
            BLOCKS,
        ),
        Row(
            "train over nf4",
            "h200-fused-nf4-r16.json",
            "r16 train, nf4, autocast, save-outputs",
            (STOCK, FUSED),
            BLOCKS,
        ),
        Row("inference", "h200-fused-r16.json", "r16 inference, autocast, save-outputs", (STOCK, FUSED), BLOCKS),
    ),
    "one 256 × 256 layer, 64 tokens": (
        Row("train", "h200-host.json", "autocast train", (STOCK, LAYER)),
        Row("inference", "h200-host.json", "autocast inference", (STOCK, LAYER)),
    ),
}
# Colours of GPU time and of wall time, each with the colour of what is written on it.
THEMES = {
    "light": {
        "text": "#1f2328",
        "grid": "#d1d9e0",
        "dorac": (("#0969da", "#ffffff"), ("#80b8f5", "#1f2328")),
        "stock": (("#bc4c00", "#ffffff"), ("#f0a873", "#1f2328")),
    },
    "dark": {
        "text": "#f0f6fc",
        "grid": "#3d444d",
        "dorac": (("#4493f8", "#0d1117"), ("#255ab2", "#f0f6fc")),
        "stock": (("#db6d28", "#0d1117"), ("#8a4a20", "#f0f6fc")),
    },
}


def figures(results: Path = RESULTS) -> dict[str, dict[str, dict[str, float]]]:
    """``{panel: {row: {"variant, time": ratio to PEFT's LoRA}}}``; what the records lack is left out."""
    return {
        panel: {row.label: _ratios(row, json.loads((results / row.record).read_text(encoding="utf-8"))) for row in rows}
        for panel, rows in PANELS.items()
    }


def save(path: Path, theme: str, results: Path = RESULTS) -> None:
    """Draws the picture in the colours of a theme; the figures are in the file's metadata, too."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # draws without a display
    from matplotlib.figure import Figure

    colours, shown = THEMES[theme], figures(results)
    with rc_context({"svg.hashsalt": "dorac", "svg.fonttype": "none", "text.color": colours["text"], "font.size": 9.5}):
        figure = Figure(figsize=(8.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        wide = figure.subplots(1, len(shown), width_ratios=(1.15, 1))
        for axes, (panel, rows) in zip(wide, shown.items(), strict=True):
            _draw(axes, panel, rows, colours)
        figure.suptitle("time relative to PEFT's LoRA (1.0): shorter is faster", fontsize=9.5, color=colours["text"])
        figure.legend(handles=_legend(shown, colours), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        drawn = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(shown)}
        figure.savefig(drawn, format="svg", transparent=True, metadata=metadata)
    path.write_bytes(drawn.getvalue())


def main(argv: list[str]) -> int:
    """Draws one file for each theme: 0 if it did.

    Raises:
        BadInput: the folder cannot be written to, or matplotlib is not installed.
    """
    parser = cli.Parser(
        prog="python -m dorac.bench picture",
        description=__doc__.partition(": ")[2],
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=PICTURES, help="for cost-light.svg and cost-dark.svg")
    args: argparse.Namespace = parser.parse_args(argv)
    cli.require_packages("picture", ["matplotlib"], "bench")
    for theme in THEMES:
        path = args.folder / f"cost-{theme}.svg"
        try:
            save(path, theme)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror or error}") from None
        print(path)
    return 0


def _ratios(row: Row, record: dict) -> dict[str, float]:
    of = {each["variant"]: each for each in record["records"] if each["case"] == row.case}
    return {
        f"{variant}, {time}": round(of[variant][key], 2)
        for variant in (*row.drawn, row.marked)
        if variant in of
        for time, keys in TIMES.items()
        for key in keys
        if of[variant].get(key) is not None
    }


def _draw(axes, panel: str, rows: dict[str, dict[str, float]], colours: dict) -> None:
    """Bars downwards, one for each variant and time; each row is one unit high."""
    height = 0.8 / max(len(_bars(of)) for of in rows.values())
    widest = 1.05 * max(1.0, *(ratio for of in rows.values() for ratio in of.values()))
    for place, of in enumerate(rows.values()):
        bars = _bars(of)
        for i, (variant, time) in enumerate(bars):
            ratio, y = of[f"{variant}, {time}"], place + (i - (len(bars) - 1) / 2) * height
            bar, on_it = _colours(variant, time, colours)
            axes.barh(y, ratio, 0.88 * height, color=bar)
            axes.text(0.015 * widest, y, f"{ratio:.2f}", va="center_baseline", fontsize=8.5, color=on_it)
            marked = of.get(f"{BLOCKS}, {time}")
            if marked is not None:
                axes.vlines(marked, y - 0.5 * height, y + 0.5 * height, color=colours["text"], linewidth=1.6)
    axes.axvline(1, color=colours["text"], linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_title(panel, fontsize=9.5, color=colours["text"], weight="bold")
    axes.set(xlim=(0, widest), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows), color=colours["text"])
    axes.tick_params(length=0, labelcolor=colours["text"], labelsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=colours["grid"], linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _bars(of: dict[str, float]) -> list[tuple[str, str]]:
    """What has a bar; :data:`BLOCKS` is a mark on another's."""
    return [pair for pair in (tuple(name.split(", ")) for name in of) if pair[0] != BLOCKS]


def _colours(variant: str, time: str, colours: dict) -> tuple[str, str]:
    return colours["stock" if variant == STOCK else "dorac"][list(TIMES).index(time)]


def _legend(shown: dict[str, dict[str, dict[str, float]]], colours: dict) -> list:
    """A patch for each kind and time that has a bar, and the mark."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = {pair for rows in shown.values() for of in rows.values() for pair in _bars(of)}
    patches = {}
    for variant, time in sorted(bars, key=lambda pair: (pair[0] != STOCK, list(TIMES).index(pair[1]))):
        label = f"{NAMES[variant]}, {time}"
        patches.setdefault(label, Patch(color=_colours(variant, time, colours)[0], label=label))
    mark = {"marker": "|", "linestyle": "none", "markersize": 9, "markeredgewidth": 1.6, "color": colours["text"]}
    return [*patches.values(), Line2D([], [], label="cheapest LoRA we know", **mark)]
