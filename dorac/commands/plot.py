"""The change of magnitude against that of direction, as the DoRA paper draws it."""

import io
from collections.abc import Mapping
from pathlib import Path

from dorac.files import storage
from dorac.files.changes import Change

_MARKERS = "osD^vPX*<>"


def save_changes(path: Path, changes: Mapping[str, Change]) -> None:
    """Draws a point per layer, named by module; a colour and marker per kind, the last part of the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds: dict[str, list[Change]] = {}
    for name, one in changes.items():
        kinds.setdefault(_kind(name), []).append(one)
    for number, (kind, points) in enumerate(kinds.items()):
        x, y = [one.direction for one in points], [one.magnitude for one in points]
        axes.scatter(
            x, y, s=28, marker=_MARKERS[number % len(_MARKERS)], color=f"C{number % 10}", alpha=0.8, label=kind
        )
    axes.set(xlabel="change of direction, mean of 1 - cos(w', w)", ylabel="change of magnitude, mean of |m' - m|")
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=120)
    storage.write_bytes(path, picture.getvalue())


def _kind(name: str) -> str:
    """The last part of the name that is no number: to_out of to_out.0."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)
