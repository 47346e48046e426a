"""The style of all pictures: colors, type, axes, and how a figure becomes a file."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transformers_radio.disk import replace_whole

# Okabe and Ito's colors, which stay apart for the color-blind
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
LINE_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "black")  # without yellow, too light on white
LINE_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OBJECT_COLORS = (ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE)
GRAY = "0.35"
PANEL = (3.6, 3.0)  # inches, of a panel with axes
LABEL_SIZE, TICK_SIZE, LEGEND_SIZE = 9, 8, 8  # points, for pictures printed at their own size
DPI = 200


def new_figure(width: float, height: float, dpi: int = DPI, layout: str | None = "constrained") -> Figure:
    """A white figure of this size in inches."""
    return Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)  # type: ignore[arg-type]


def style_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Two labels, two spines, and faint grid lines behind what is drawn."""
    axes.set_xlabel(xlabel, size=LABEL_SIZE, parse_math=False)
    axes.set_ylabel(ylabel, size=LABEL_SIZE, parse_math=False)
    axes.tick_params(which="both", labelsize=TICK_SIZE, color="0.6", labelcolor="0.2")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("0.6")


def panel_grid(panels: int) -> tuple[int, int]:
    """Rows and columns for this number of panels: up to three side by side, four as two by two."""
    columns = 2 if panels == 4 else min(panels, 3)
    return -(-panels // columns), columns


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG, or with the suffix .pdf a vector file that contains its fonts; the folder is made.

    The file is written whole. The same figure gives the same bytes.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    metadata = {"CreationDate": None} if kind == "pdf" else None
    # fonts as TrueType: publishers refuse matplotlib's default
    with matplotlib.rc_context({"pdf.fonttype": 42}), replace_whole(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)
    return path
