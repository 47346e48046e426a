"""The curves of `eval resolution` as a picture: a panel for each measure, a line for each model."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from .results import Result

Size = tuple[int, int]  # height, width
PANELS_A_ROW = 3
CLOSEST_TICKS = 1.05  # sizes nearer to each other have one name on the axis


def size_name(size: Size) -> str:
    """ "432", or "432x768" (height x width)."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def parse_size(name: str) -> Size:
    height, _, width = name.partition("x")
    return int(height), int(width or height)


def curves(result: Result) -> dict[str, dict[Size, float]]:
    """Measure -> size -> value, of the metrics "MEASURE @ SIZE"."""
    found: dict[str, dict[Size, float]] = {}
    for name, value in result.metrics.items():
        measure, at, size = name.rpartition(" @ ")
        if at:
            found.setdefault(measure, {})[parse_size(size)] = value
    return found


def resolution_figure(results: Sequence[Result], path: Path, dpi: int = 150) -> Path:
    """Write a PNG: a panel for each measure; lines join the square sizes, and diamonds are the others.

    A size has its place by the side of the square with as many pixels. The reference has a dotted line, and red rings
    mark what the result flags.

    Args:
        path: replaced in one step, so that a reader never meets half a file.

    Raises:
        ValueError: no result has a measure at a size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of_models = [curves(result) for result in results]
    measures = list(dict.fromkeys(measure for one in of_models for measure in one))
    if not measures:
        raise ValueError("There is no curve to draw: no result has metrics such as 'k-NN @ 432'.")
    columns = min(len(measures), PANELS_A_ROW)
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 0.5), dpi=dpi, facecolor="white", layout="constrained")
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(rows, columns, number + 1)
        sizes = sorted({size for one in of_models for size in one.get(measure, {})}, key=_place)
        for index, (result, one) in enumerate(zip(results, of_models, strict=True)):
            values, colour = one.get(measure, {}), f"C{index}"
            square = sorted(size for size in values if size[0] == size[1])
            axes.plot([s[0] for s in square], [values[s] for s in square], "o-", color=colour, label=result.model)
            others = [size for size in values if size[0] != size[1]]
            axes.plot([_place(s) for s in others], [values[s] for s in others], "D", mfc="none", color=colour)
            marked = [parse_size(size) for size, what in result.settings.get("flagged", {}).items() if measure in what]
            axes.plot([_place(s) for s in marked], [values[s] for s in marked], "o", ms=12, mfc="none", color="red")
            axes.axvline(_place(parse_size(str(result.settings["reference"]))), color=colour, ls=":", lw=1)
        axes.set_xscale("log")
        named = sizes[:1]
        for size in sizes:
            if _place(size) > CLOSEST_TICKS * _place(named[-1]):
                named.append(size)
        axes.set_xticks([_place(s) for s in named], [size_name(s) for s in named], rotation=60, size=7)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("input (px)", size=8)
        axes.set_title(measure if "cosine" in measure else f"{measure} (%)", size=10)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        if number == 0:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
    return path


def _place(size: Size) -> float:
    return math.sqrt(size[0] * size[1])
