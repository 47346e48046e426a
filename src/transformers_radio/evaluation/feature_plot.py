"""One picture of a model's features: patch norms and where the outliers are, channels, and the position table."""

import os
from pathlib import Path

import torch

from .feature_statistics import ChannelStatistics, PatchNorms
from .visualize import pca_rgb


def features_figure(
    title: str, norms: PatchNorms, channels: ChannelStatistics, table: torch.Tensor | None, path: Path, dpi: int = 150
) -> Path:
    """Write a PNG of four panels.

    Args:
        table: positions (h, w, D) in the colours of three principal components, or None.
        path: replaced in one step, so that a reader never meets half a file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 7.2), dpi=dpi, facecolor="white", layout="constrained")
    figure.suptitle(title, size=11)
    histogram, places, by_channel, positions = figure.subplots(2, 2).flatten()

    histogram.hist(norms.norms.flatten().numpy(), bins=100, log=True, color="C0")
    histogram.axvline(norms.threshold, color="red", lw=1)
    histogram.set_title(f"patch norms; {100 * norms.share:.2f} % above {norms.threshold:.3g}", size=9)
    histogram.set_xlabel("norm", size=8)

    shown = places.imshow(norms.norms.mean(dim=0).numpy())
    figure.colorbar(shown, ax=places)
    rows, columns = norms.positions.nonzero(as_tuple=True)
    sizes = 60 * norms.positions[rows, columns]
    places.scatter(columns.numpy(), rows.numpy(), s=sizes.numpy(), edgecolors="red", facecolors="none")
    places.set_title("mean norm; circles: share of images with an outlier", size=9)

    by_channel.plot(channels.rms.numpy(), ".", ms=3, label="rms")
    by_channel.plot(channels.std.numpy(), ".", ms=3, label="standard deviation")
    by_channel.set_yscale("log")
    by_channel.set_title(f"channels; the largest is {channels.largest}, {int(channels.dead.sum())} dead", size=9)
    by_channel.set_xlabel("channel", size=8)
    by_channel.legend(fontsize=7)

    if table is None:
        positions.text(0.5, 0.5, "no table of positions", ha="center", va="center", size=9)
    else:
        grid = (table.shape[0], table.shape[1])
        # (h, w, D) -> (h*w, D)
        (picture,) = pca_rgb([table.flatten(0, 1)], [grid])
        positions.imshow(picture.numpy(), interpolation="nearest")
        positions.set_title(f"position table {grid[0]} x {grid[1]}, three principal components", size=9)
    for axes in (places, positions):
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
    return path
