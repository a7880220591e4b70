"""The loss curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def save_curve(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str) -> None:
    """Draws each curve ``label: (steps, losses)`` into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (label, (steps, losses)), style in zip(curves.items(), ("-", "o--"), strict=False):
        axes.plot(steps, losses, style, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
