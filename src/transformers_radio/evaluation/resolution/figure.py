"""The curves of `eval resolution` as a picture: a panel for each measure, a line for each model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from transformers_radio.evaluation.figure_style import (
    GRAY,
    LEGEND_SIZE,
    LINE_COLORS,
    LINE_MARKERS,
    PANEL,
    TICK_SIZE,
    new_figure,
    panel_grid,
    save_figure,
    style_axes,
)
from transformers_radio.evaluation.result import Result

Size = tuple[int, int]  # height, width
FLAG: dict[str, Any] = {
    "marker": "o",
    "markersize": 12,
    "markerfacecolor": "none",
    "color": "red",
    "linestyle": "none",
}
UNCLIPPED: dict[str, Any] = {
    "clip_on": False,
    "in_layout": False,
}  # whole marks at the edges, without room of their own
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


def resolution_figure(results: Sequence[Result], path: Path) -> list[Path]:
    """Write a PNG and, beside it, the same as a PDF: a panel for each measure.

    A line joins the square sizes of a model, and open diamonds are its others. A size stands at the side of the square
    with as many pixels. Each reference has a dotted line, and rings mark what the results flag.

    Args:
        path: of the PNG.

    Raises:
        ValueError: no result has a measure at a size.
    """

    of_models = [curves(result) for result in results]
    measures = list(dict.fromkeys(measure for one in of_models for measure in one))
    if not measures:
        raise ValueError("There is no curve to draw: no result has metrics such as 'k-NN @ 432'.")
    rows, columns = panel_grid(len(measures))
    figure = new_figure(PANEL[0] * columns, PANEL[1] * rows + 0.3)
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(rows, columns, number + 1)
        style_axes(axes, "Input size (pixels)", measure if "cosine" in measure else f"{measure} (%)")
        for index, (result, one) in enumerate(zip(results, of_models, strict=True)):
            if measure in one:
                _draw_curve(axes, result, measure, one[measure], index)
        _size_axis(axes, sorted({size for one in of_models for size in one.get(measure, {})}, key=_place))
        low, high = axes.dataLim.y0, axes.dataLim.y1
        axes.set_ylim(1.06 * min(low, 0.0), 1.06 * max(high, 0.0) or 1.0)
    handles = _legend(results, of_models)
    per_row = 3 * columns if len(handles) > 3 * columns else len(handles)
    style: dict[str, Any] = {"frameon": False, "fontsize": LEGEND_SIZE}
    figure.legend(handles=handles, loc="outside upper center", ncols=per_row, **style)
    return [save_figure(figure, path), save_figure(figure, path.with_suffix(".pdf"))]


def _legend(results: Sequence[Result], of_models: Sequence[dict[str, dict[Size, float]]]) -> list[Line2D]:
    """The models, and of the marks those that are drawn."""
    handles = [Line2D([], [], label=result.model, **_style(index)) for index, result in enumerate(results)]
    handles.append(Line2D([], [], color=GRAY, ls=":", lw=1, label="reference size"))
    if any(size[0] != size[1] for one in of_models for values in one.values() for size in values):
        handles.append(Line2D([], [], color=GRAY, marker="D", mfc="none", ls="none", label="not square"))
    if any(result.settings.get("flagged") for result in results):
        handles.append(Line2D([], [], **FLAG, label="far below the reference"))
    return handles


def _style(index: int) -> dict[str, Any]:
    color, marker = LINE_COLORS[index % len(LINE_COLORS)], LINE_MARKERS[index % len(LINE_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5, **UNCLIPPED}


def _draw_curve(axes: Axes, result: Result, measure: str, values: dict[Size, float], index: int) -> None:
    style = _style(index)
    square = sorted(size for size in values if size[0] == size[1])
    others = [size for size in values if size[0] != size[1]]
    flagged = result.settings.get("flagged", {})
    marked = [parse_size(size) for size, what in flagged.items() if measure in what]
    axes.plot([s[0] for s in square], [values[s] for s in square], **style)
    style |= {"marker": "D", "linestyle": "none", "markerfacecolor": "none"}
    axes.plot([_place(s) for s in others], [values[s] for s in others], **style)
    axes.plot([_place(s) for s in marked], [values[s] for s in marked], **FLAG, **UNCLIPPED)
    axes.axvline(_place(parse_size(str(result.settings["reference"]))), color=style["color"], ls=":", lw=1)


def _size_axis(axes: Axes, sizes: Sequence[Size]) -> None:
    """Logarithmic, with the sizes themselves for ticks, as far as they have room."""
    named = list(sizes[:1])
    for size in sizes:
        if _place(size) > CLOSEST_TICKS * _place(named[-1]):
            named.append(size)
    axes.set_xscale("log")
    axes.set_xticks([_place(s) for s in named], [size_name(s) for s in named], rotation=60, size=TICK_SIZE)
    axes.set_xticks([], minor=True)


def _place(size: Size) -> float:
    return math.sqrt(size[0] * size[1])
