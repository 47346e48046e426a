"""The layout that all pictures share: columns of panels under their titles, one row per image, written as a PNG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from transformers_radio.evaluation.figure_style import GRAY, new_figure, save_figure

HEAT_SHARE = 0.65  # of the color in a heat map that lies over an image
MARGIN, GAP, TITLE, SUBTITLE, ROW_TITLE = 0.12, 0.06, 0.26, 0.16, 0.26  # inches; SUBTITLE is one line's height
TITLE_SIZE, SMALLEST_TITLE = 10, 6  # points


@dataclass
class Column:
    """A column of a picture.

    Attributes:
        title, subtitle: above the column; a subtitle may have several lines.
        panels: one per row, (h, w, 3), float in [0, 1] or uint8; stretched over the panel's place.
        smooth: True for photographs; False keeps the edges of patches.
        draw: called with a panel's axes, in units of its pixels, and its row, to draw over it.
    """

    title: str
    subtitle: str
    panels: Sequence[torch.Tensor]
    smooth: bool = False
    draw: Callable[[Axes, int], None] | None = None


def photographs(images: Sequence[torch.Tensor], title: str = "Input") -> Column:
    """The column of the images themselves, each (3, H, W), uint8 or float in [0, 1]."""
    sizes = {f"{image.shape[2]} × {image.shape[1]} px" for image in images}
    panels = [image.permute(1, 2, 0).cpu() for image in images]  # (3, H, W) -> (H, W, 3)
    return Column(title, sizes.pop() if len(sizes) == 1 else "several sizes", panels, smooth=True)


def heat(values: torch.Tensor, low: float, high: float, image: torch.Tensor | None = None) -> torch.Tensor:
    """Colors, dark to bright (inferno, which the color-blind read alike): float32 (h, w, 3) in [0, 1].

    Args:
        values: (h, w).
        low, high: the values of the darkest and the brightest color. Where they are equal, all is dark.
        image: (3, H, W), uint8 or float in [0, 1]: each value fills the place of its patch over the image's gray
            levels, with hard edges, as the map has no more detail than its grid; the result is then (H, W, 3).
    """
    values = ((values.float().cpu() - low) / max(high - low, 1e-9)).clamp(0, 1)
    if image is not None:
        values = F.interpolate(values[None, None], size=image.shape[1:], mode="nearest-exact")[0, 0]
    colors = torch.from_numpy(matplotlib.colormaps["inferno"](values.numpy())[..., :3]).float()
    if image is None:
        return colors
    gray = (image.float() / 255 if image.dtype == torch.uint8 else image).mean(dim=0).cpu()  # (H, W)
    return HEAT_SHARE * colors + (1 - HEAT_SHARE) * gray[..., None]


def write_panels(
    columns: Sequence[Column],
    path: str | Path,
    row_titles: Sequence[str] | None = None,
    panel_inches: float = 1.6,
    dpi: int = 160,
) -> Path:
    """Writes the columns side by side as a PNG.

    All panels are `panel_inches` wide; a row is as high as the aspect ratio of its first panel asks.

    Raises:
        ValueError: no column or row, or columns of different lengths.
    """
    lengths = {column.title: len(column.panels) for column in columns}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"The columns have {lengths} panels; expected the same number in each, at least 1.")
    if row_titles is not None and len(row_titles) != len(columns[0].panels):
        raise ValueError(f"There are {len(row_titles)} titles for {len(columns[0].panels)} rows.")
    heights = [panel_inches * panel.shape[0] / panel.shape[1] for panel in columns[0].panels]
    first = MARGIN + (ROW_TITLE if row_titles else 0)
    width = first + MARGIN + len(columns) * (panel_inches + GAP) - GAP
    lines = max(column.subtitle.count("\n") for column in columns) + 1
    header = TITLE + lines * SUBTITLE
    height = 2 * MARGIN + header + sum(heights) + (len(heights) - 1) * GAP
    figure = new_figure(width, height, dpi, layout=None)
    titles, title_size = _fit([column.title for column in columns], panel_inches)
    texts = [line for column in columns for line in _lines(column.subtitle, lines)]
    subtitles, subtitle_size = _fit(texts, panel_inches, largest=7, weight="normal")
    for number, column in enumerate(columns):
        left = first + number * (panel_inches + GAP)
        middle = (left + panel_inches / 2) / width
        common: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False}
        at = middle, 1 - (MARGIN + 0.1) / height
        figure.text(*at, titles[number], size=title_size, weight="bold", **common)
        for line, text in enumerate(subtitles[number * lines : (number + 1) * lines]):
            at = middle, 1 - (MARGIN + 0.28 + line * SUBTITLE * 0.8) / height
            figure.text(*at, text, size=subtitle_size, color=GRAY, **common)
        top = height - MARGIN - header
        for row, panel in enumerate(column.panels):
            bottom = top - heights[row]
            axes = figure.add_axes((left / width, bottom / height, panel_inches / width, heights[row] / height))
            axes.imshow(
                panel.cpu().numpy(), aspect="auto", interpolation="antialiased" if column.smooth else "nearest"
            )
            axes.set_axis_off()
            if column.draw is not None:
                column.draw(axes, row)
            if row_titles and number == 0:
                (title,), size = _fit([row_titles[row]], heights[row], largest=9)
                place = ((MARGIN + ROW_TITLE / 2) / width, (bottom + heights[row] / 2) / height)
                figure.text(*place, title, rotation=90, size=size, weight="bold", **common)
            top = bottom - GAP
    return save_figure(figure, path)


def _lines(text: str, count: int) -> list[str]:
    """The lines of a text, and empty ones up to `count`."""
    lines = text.split("\n")
    return lines + [""] * (count - len(lines))


def _fit(
    texts: Sequence[str], inches: float, largest: float = TITLE_SIZE, weight: str = "bold"
) -> tuple[list[str], float]:
    """The texts and one size in points at which each fits over its panel; too long ones are cut in the middle."""
    room = 72 * inches
    widths = [_width(text, weight) for text in texts]
    size = max(SMALLEST_TITLE, min(largest, room / max(widths)))
    fitted = []
    for text, width in zip(texts, widths, strict=True):
        kept = int(len(text) * room / (width * size))  # letters, at their mean width
        cut = text
        while kept > 1 and _width(cut, weight) * size > room:
            cut = f"{text[: kept // 2]}…{text[-(kept // 2) :]}"
            kept -= 2
        fitted.append(cut)
    return fitted, size


def _width(text: str, weight: str) -> float:
    """The width of a text in points at a font size of 1 point; never 0."""
    width, _, _ = TextToPath().get_text_width_height_descent(text, FontProperties(size=100, weight=weight), False)
    return max(width / 100, 1e-3)
