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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.path import Path as Segment
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from transformers_radio.evaluation.figure_style import (
    BLUE,
    LEGEND_SIZE,
    PANEL,
    VERMILION,
    new_figure,
    panel_grid,
    save_figure,
    style_axes,
)

from .table import Table

LEGEND_HEIGHT = 0.3  # inches
# Apart in shape, filling and, also to the color-blind, in color
STUDENT: dict[str, Any] = {"marker": "o", "color": BLUE, "markersize": 7, "linestyle": "none"}
TEACHER: dict[str, Any] = {
    "marker": "s",
    "color": VERMILION,
    "markersize": 6,
    "linestyle": "none",
    "markerfacecolor": "white",
    "markeredgewidth": 1.6,
}
LOG_FROM = 3.0  # ratio of the fastest to the slowest model from which the axis is logarithmic
# What an axis of quality spans at least, so that small differences look small
LEAST_POINTS, LEAST_SHARE = 10.0, 0.25  # of percentages; of the largest value in other units
DISTANCES = (7, 12, 18, 26, 36, 48, 62, 80, 100, 125, 150)  # points from a model to its label, tried in turn
MARKER_POINTS = 6  # half a side of what a marker covers
LEADER_FROM = 9  # points: labels farther away have a line to their model
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


def quality_throughput_figure(table: Table, students: Collection[str], path: str | Path) -> list[Path]:
    """Write a PNG and, beside it, the same as a PDF; nothing if no metric has two models with a throughput.

    Students are filled circles, teachers open squares; better is further up and to the right. A model stands over its
    throughput at the resolution that the metric was measured at (`Row.speeds`); a panel leaves out the models that
    lack either. An axis of quality spans at least 10 points (in other units a quarter of its largest value); one of
    throughput begins at 0, or is logarithmic if the fastest model is three times as fast as the slowest.

    Args:
        table: throughput in images/s; metrics in percent, or in `table.units`.
        students: the models of the table that are students; the others are teachers.
        path: of the PNG.

    Raises:
        ValueError: a student that is not in the table.
    """
    missing = set(students) - {row.model for row in table.rows}
    if missing:
        raise ValueError(f"The table has no {', '.join(sorted(missing))}; it has {[row.model for row in table.rows]}.")
    panels = {metric: _points(table, metric) for metric in table.columns[4:]}
    panels = {metric: points for metric, points in panels.items() if len(points) > 1}
    if not panels:
        return []
    down, across = panel_grid(len(panels))
    width, height = across * PANEL[0], down * PANEL[1] + LEGEND_HEIGHT
    figure = new_figure(width, height, layout=None)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - LEGEND_HEIGHT / height), w_pad=0.08, h_pad=0.06)
    figure.set_layout_engine(layout)
    canvas = FigureCanvasAgg(figure)
    shown = {point.model in students for points in panels.values() for point in points}
    kinds = [(label, style) for label, style, kind in _KINDS if kind in shown]
    handles = [Line2D([], [], label=label, **style) for label, style in kinds]
    middle = 1 - LEGEND_HEIGHT / 2 / height
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=(0.5, middle), ncols=2, frameon=False, fontsize=LEGEND_SIZE
    )
    drawn = []
    for number, (metric, points) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, number + 1)
        _draw_panel(axes, metric, points, students, table)
        drawn.append((axes, points))
    figure.draw_without_rendering()  # settles the layout: from here on pixels stay where they are
    figure.set_layout_engine("none")
    for axes, points in drawn:
        _label_points(axes, canvas.get_renderer(), points, students)
    return [save_figure(figure, path), save_figure(figure, Path(path).with_suffix(".pdf"))]


_KINDS = (("student", STUDENT, True), ("teacher", TEACHER, False))


def _points(table: Table, metric: str) -> list[_Point]:
    points = []
    for row in table.rows:
        value, speed = row.metrics.get(metric), row.speeds.get(metric, row.throughput)
        if value is not None and speed:
            points.append(_Point(row.model, speed, value))
    return points


def _draw_panel(axes: Axes, metric: str, points: Sequence[_Point], students: Collection[str], table: Table) -> None:
    for point in points:
        axes.plot([point.speed], [point.value], clip_on=False, **(STUDENT if point.model in students else TEACHER))
    unit = table.units.get(metric, "%")
    lower_is_better = metric in table.lower_is_better
    notes = [unit] if unit else []
    notes += ["lower is better"] if lower_is_better else []
    style_axes(axes, "Throughput (images/s)", f"{metric} ({', '.join(notes)})" if notes else metric)
    slowest, fastest = min(point.speed for point in points), max(point.speed for point in points)
    if fastest >= LOG_FROM * slowest:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        margin = (fastest / slowest) ** 0.2
        axes.set_xlim(slowest / margin, fastest * margin)
    else:
        axes.set_xlim(0, 1.15 * fastest)
    axes.set_ylim(*_limits([point.value for point in points], unit))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if lower_is_better:
        axes.invert_yaxis()


def _limits(values: Sequence[float], unit: str) -> tuple[float, float]:
    """The ends of the axis of quality: room around the values, a least span, percentages within 0 to 100."""
    low, high = min(values), max(values)
    least = LEAST_POINTS if unit == "%" else LEAST_SHARE * max(abs(low), abs(high)) or 1.0
    span = max(1.3 * (high - low), least)
    bottom = (low + high - span) / 2
    if unit == "%":
        bottom = max(min(bottom, 100 - span), 0.0)
    return bottom, bottom + span


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
        style: dict[str, Any] = {"size": 7, "color": "0.15", "parse_math": False, "textcoords": "offset points"}
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
            line = {"arrowstyle": "-", "color": "0.55", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3.5}
            at = (point.speed, point.value)
            axes.annotate("", at, xytext=(dx, dy), textcoords="offset points", arrowprops=line)


def _common_area(box: np.ndarray, others: np.ndarray) -> float:
    """The area that one box (4,) has in common with each of the others (n, 4), summed."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])  # (n, 2)
    return float(sides.clip(min=0).prod(axis=1).sum())
