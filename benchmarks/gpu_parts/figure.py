"""The picture of a gpu.json: `figure.py FILE` writes gpu.png beside it."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from transformers_radio.evaluation.figure_style import (
    BLUE,
    GRAY,
    TICK_SIZE,
    VERMILION,
    new_figure,
    save_figure,
    style_axes,
)

MOST_BARS = 24
PANELS = {  # part -> the column that is drawn, and its name
    "encoders": ("% of peak", "forward, % of the measured bf16 peak"),
    "training": ("% of peak", "step, % of the measured bf16 peak"),
    "efficient": ("x OpenCLIP", "images/s over OpenCLIP ViT-H/14 (open: the paper)"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the parts that were measured; a picture that says so where none was."""
    panels = {}
    for part, (column, _) in PANELS.items():
        rows = [row for row in report["rows"] if row["part"] == part and isinstance(row.get(column), float)]
        if rows:
            panels[part] = rows[:MOST_BARS]
    most = max((len(rows) for rows in panels.values()), default=1)
    figure = new_figure(5.2 * max(len(panels), 1), 1.3 + 0.2 * most)
    figure.suptitle(f"{report['card']}, torch {report['versions']['torch']}, {report['date']}", size=TICK_SIZE + 1)
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, (part, rows) in zip(grid, panels.items(), strict=False):
        bars(axes, part, rows)
    if not panels:
        grid[0].set_axis_off()
        grid[0].text(0.5, 0.5, "nothing to draw was measured", ha="center", color=GRAY)
    save_figure(figure, path)


def bars(axes: Axes, part: str, rows: list[dict[str, Any]]) -> None:
    column, label = PANELS[part]
    places = range(len(rows), 0, -1)
    axes.barh(places, [row[column] for row in rows], color=BLUE, height=0.7)
    paper = [row.get(f"{column}, paper") for row in rows]
    if any(paper):
        axes.plot(paper, places, "o", color=VERMILION, markerfacecolor="none", markersize=4)
    style_axes(axes, label, "")
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.grid(visible=False, axis="y")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    draw(json.loads(file.read_text(encoding="utf-8")), file.with_name("gpu.png"))
