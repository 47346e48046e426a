"""One picture of a model's features: patch norms and where the outliers are, channels, and the position table."""

from pathlib import Path

import torch

from transformers_radio.evaluation.figure_style import (
    BLUE,
    LABEL_SIZE,
    LEGEND_SIZE,
    TICK_SIZE,
    VERMILION,
    new_figure,
    save_figure,
    style_axes,
)
from transformers_radio.evaluation.pca import pca_rgb

from .statistics import ChannelStatistics, PatchNorms


def features_figure(
    title: str, norms: PatchNorms, channels: ChannelStatistics, table: torch.Tensor | None, path: Path
) -> list[Path]:
    """Write a PNG and, beside it, the same as a PDF: four panels.

    A circle on the map of mean norms is as large as the share of images whose patch there is an outlier.

    Args:
        table: positions (h, w, D) in the colors of three principal components, or None.
        path: of the PNG.
    """
    figure = new_figure(7.4, 6.4)
    figure.suptitle(title, size=10)
    histogram, places, by_channel, positions = figure.subplots(2, 2).flatten()

    style_axes(histogram, "L2 norm of a patch token", "Patches")
    histogram.hist(norms.norms.flatten().numpy(), bins=100, log=True, color=BLUE)
    histogram.axvline(norms.threshold, color=VERMILION, lw=1.2)
    histogram.set_title(f"{100 * norms.share:.2f} % of the norms are above {norms.threshold:.3g}", size=LABEL_SIZE)

    grid = norms.norms.shape[1:]
    shown = places.imshow(norms.norms.mean(dim=0).numpy(), interpolation="nearest")
    bar = figure.colorbar(shown, ax=places)
    bar.set_label("Mean L2 norm", size=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    rows, columns = norms.positions.nonzero(as_tuple=True)
    sizes = 60 * norms.positions[rows, columns]
    places.scatter(columns.numpy(), rows.numpy(), s=sizes.numpy(), edgecolors="red", facecolors="none")
    circles = "; circles: outliers" if len(rows) else ""
    places.set_title(f"{grid[1]} × {grid[0]} patches{circles}", size=LABEL_SIZE)

    style_axes(by_channel, "Channel", "Value over all patches")
    by_channel.plot(channels.rms.numpy(), ".", ms=3, color=BLUE, label="root mean square")
    by_channel.plot(channels.std.numpy(), ".", ms=3, color=VERMILION, label="standard deviation")
    by_channel.set_yscale("log")
    dead = int(channels.dead.sum())
    by_channel.set_title(f"largest channel: {channels.largest}; dead channels: {dead}", size=LABEL_SIZE)
    by_channel.margins(y=0.2)  # room for the legend
    by_channel.legend(
        fontsize=LEGEND_SIZE, markerscale=2, frameon=False, ncols=2, loc="upper center", handletextpad=0.1
    )

    if table is None:
        positions.text(0.5, 0.5, "no position table", ha="center", va="center", size=LABEL_SIZE)
    else:
        # (h, w, D) -> (h*w, D)
        (picture,) = pca_rgb([table.flatten(0, 1)], [(table.shape[0], table.shape[1])])
        positions.imshow(picture.numpy(), interpolation="nearest")
        sides = f"{table.shape[1]} × {table.shape[0]}"
        positions.set_title(f"position table, {sides}: three principal components", size=LABEL_SIZE)
    for axes in (places, positions):
        axes.set_axis_off()
    return [save_figure(figure, path), save_figure(figure, path.with_suffix(".pdf"))]
