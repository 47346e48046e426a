"""Quality against throughput, as in the paper's Figure 1: a panel for each metric, a point for each model."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.path import Path as Segment
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from .report import Table
from .visualize_panels import save_png

PANELS_A_ROW = 3
PANEL = (4.0, 3.3)  # inches
# Apart in shape, filling and, also to the colour-blind, in colour (Okabe and Ito's blue and vermilion)
STUDENT: dict[str, Any] = {"marker": "o", "color": "#0072B2", "markersize": 8, "linestyle": "none"}
TEACHER: dict[str, Any] = {
    "marker": "s",
    "color": "#D55E00",
    "markersize": 7,
    "linestyle": "none",
    "markerfacecolor": "white",
    "markeredgewidth": 1.8,
}
LOG_FROM = 3.0  # ratio of the fastest to the slowest model from which the axis is logarithmic
DISTANCES = (7, 12, 18, 26, 36, 48, 62, 80, 100, 125, 150)  # points from a model to its label, tried in turn
MARKER_POINTS = 6  # half a side of what a marker covers
LEADER_FROM = 13  # points: labels farther away have a line to their model
DIRECTIONS = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
DIRECTIONS += [
    (across * side, up * half)
    for across, up in ((0.9, 0.45), (0.7, 0.7), (0.45, 0.9))
    for side in (1, -1)
    for half in (1, -1)
]
CROSSING = 5  # square pixels of a name under another that are as bad as a line across a name or a point


@dataclass
class _Point:
    model: str
    speed: float  # images/s
    value: float


def quality_throughput_figure(
    table: Table, students: Collection[str], path: str | Path, dpi: int = 150
) -> Path | None:
    """Write a PNG; None, and no file, where no model has both a throughput and a metric.

    Students are filled circles, teachers open squares; better is further up and to the right. A panel leaves out the
    models that lack its metric or a throughput.

    Args:
        table: throughput in images/s, metrics of any unit.
        students: the models of the table that are students; the others are teachers.

    Raises:
        ValueError: a student that is not in the table.
    """
    missing = set(students) - {row.model for row in table.rows}
    if missing:
        raise ValueError(f"The table has no {', '.join(sorted(missing))}; it has {[row.model for row in table.rows]}.")
    panels = {}
    for metric in table.columns[4:]:
        values = [(row.model, row.throughput, row.metrics.get(metric)) for row in table.rows]
        points = [_Point(model, speed, value) for model, speed, value in values if speed and value is not None]
        if points:
            panels[metric] = points
    if not panels:
        return None
    across = min(len(panels), PANELS_A_ROW)
    down = math.ceil(len(panels) / across)
    # a lone panel is as wide as the legend needs
    width, height = max(across * PANEL[0], 4.6), down * PANEL[1] + 0.6
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.6 / height), w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.17 / height, table.title, ha="center", va="center", size=11, weight="bold")
    kinds = [("student", STUDENT)] if len(students) == len(table.rows) else []
    kinds = kinds or [("student", STUDENT), ("teacher", TEACHER)]
    handles = [Line2D([], [], label=label, **style) for label, style in kinds]
    figure.legend(handles=handles, loc="center", bbox_to_anchor=(0.5, 1 - 0.42 / height), ncols=2, frameon=False)
    drawn = []
    for number, (metric, points) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, number + 1)
        _draw_panel(axes, metric, points, students, metric in table.lower_is_better)
        drawn.append((axes, points))
    figure.draw_without_rendering()  # settles the layout: from here on pixels stay where they are
    figure.set_layout_engine("none")
    for axes, points in drawn:
        _label_points(axes, canvas.get_renderer(), points, students)
    return save_png(figure, path)


def _draw_panel(
    axes: Axes, metric: str, points: Sequence[_Point], students: Collection[str], lower_is_better: bool
) -> None:
    for point in points:
        axes.plot([point.speed], [point.value], **(STUDENT if point.model in students else TEACHER))
    speeds = [point.speed for point in points]
    if max(speeds) >= LOG_FROM * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.22, 0.18)
    if lower_is_better:
        axes.invert_yaxis()
    axes.set_title(
        f"{metric} (lower is better)" if lower_is_better else metric, size=10, weight="bold", parse_math=False
    )
    axes.set_xlabel("images/s", size=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label_points(axes: Axes, renderer: Any, points: Sequence[_Point], students: Collection[str]) -> None:
    """A name at each point: the nearest place in the panel where it lies over no other name, point or line."""
    pixel = renderer.dpi / 72  # pixels of a point of type
    places = axes.transData.transform([(point.speed, point.value) for point in points])
    reach = MARKER_POINTS * pixel
    taken = np.hstack([places - reach, places + reach])  # (n, 4): x0, y0, x1, y1 in pixels
    panel = np.array([axes.bbox.extents])
    lines: list[Segment] = []
    order = sorted(range(len(points)), key=lambda number: points[number].model not in students)  # the nearest places
    for number in order:
        point, (x, y) = points[number], places[number]
        others = [Bbox.from_extents(*box) for box in np.delete(taken, number, axis=0)]
        style: dict[str, Any] = {"size": 7.5, "color": "0.15", "parse_math": False, "textcoords": "offset points"}
        style["weight"] = "bold" if point.model in students else "normal"
        label = axes.annotate(point.model, (point.speed, point.value), xytext=(0, 0), **style)
        size = label.get_window_extent(renderer)
        best: tuple[float, np.ndarray, tuple[float, float]] | None = None  # pixels in the way, box, offset in points
        for distance, (across, up) in product(DISTANCES, DIRECTIONS):
            dx, dy = across * distance, up * distance
            left = x + dx * pixel - (0 if across > 0 else size.width if across < 0 else size.width / 2)
            bottom = y + dy * pixel - (0 if up > 0 else size.height if up < 0 else size.height / 2)
            box = np.array([left, bottom, left + size.width, bottom + size.height])
            hidden = _common_area(box, taken) + size.width * size.height - _common_area(box, panel)
            hidden += CROSSING * sum(line.intersects_bbox(Bbox.from_extents(*box)) for line in lines)
            leader = Segment([(x, y), (x + dx * pixel, y + dy * pixel)])
            if distance > LEADER_FROM:
                hidden += CROSSING * sum(leader.intersects_bbox(other) for other in others)
            hidden = float(round(hidden))  # what is below a pixel is rounding
            if best is None or hidden < best[0]:
                best = hidden, box, (dx, dy)
            if hidden == 0:
                break
        assert best is not None
        _, box, (dx, dy) = best
        label.set(position=((box[0] - x) / pixel, (box[1] - y) / pixel), ha="left", va="bottom")
        taken = np.vstack([taken, box + pixel * np.array([-1, -1, 1, 1])])
        if math.hypot(dx, dy) > LEADER_FROM:
            lines.append(Segment([(x, y), (x + dx * pixel, y + dy * pixel)]))
            line = {"arrowstyle": "-", "color": "0.55", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
            at = (point.speed, point.value)
            axes.annotate("", at, xytext=(dx, dy), textcoords="offset points", arrowprops=line)


def _common_area(box: np.ndarray, others: np.ndarray) -> float:
    """Of one box (4,) with each of the others (n, 4), summed."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])  # (n, 2)
    return float(sides.clip(min=0).prod(axis=1).sum())
