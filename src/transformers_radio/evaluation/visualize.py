"""Pictures of dense features: three principal components shown as red, green and blue."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Vision transformers have a few high-norm artefact patches (about 2% in DINOv2-g) that would take over the basis.
OUTLIER_SHARE = 0.03
CLIP_PERCENTILES = (1.0, 99.0)


def pca_rgb(features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Three principal components of the patches of all images as colours: per image float32 (h, w, 3) in [0, 1].

    One basis and one colour scale serve all the images, so that equal colours mean equal content. The basis leaves
    out the 3% of patches farthest from the median, each component is clipped to its 1st..99th percentile, and its
    sign makes its largest loading positive, so that the same features always give the same picture.

    Args:
        features: per image (h * w, C), row-major, C >= 3.
        grids: per image (h, w).
    """
    if not features or len(features) != len(grids):
        raise ValueError(f"Expected one grid per image and at least one image; got {len(features)} and {len(grids)}.")
    for feature, (h, w) in zip(features, grids, strict=True):
        if feature.ndim != 2 or feature.shape[0] != h * w or feature.shape[1] < 3:
            raise ValueError(f"The features are {tuple(feature.shape)}; expected ({h} * {w}, C) with C >= 3.")
    patches = torch.cat([feature.detach().double().cpu() for feature in features])  # (all patches, C)
    if not patches.isfinite().all():
        raise ValueError("The features hold NaN or infinite values; check the model that produced them.")
    distance = (patches - patches.median(dim=0).values).norm(dim=1)
    inliers = patches[distance <= distance.quantile(1 - OUTLIER_SHARE)]
    mean = inliers.mean(dim=0)
    _, directions = torch.linalg.eigh((inliers - mean).T @ (inliers - mean))  # ascending eigenvalues
    basis = directions[:, -3:].flip(1)  # (C, 3), the strongest first
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    components = (patches - mean) @ basis
    low, high = (components.quantile(p / 100, dim=0) for p in CLIP_PERCENTILES)
    # A component without spread (constant features) becomes black instead of amplified rounding errors.
    colours = ((components - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).float()
    per_image = colours.split([len(feature) for feature in features])
    return [c.reshape(h, w, 3) for c, (h, w) in zip(per_image, grids, strict=True)]  # (h * w, 3) -> (h, w, 3)


def teacher_student_figure(
    images: torch.Tensor,
    columns: Mapping[str, tuple[torch.Tensor, tuple[int, int]]],
    path: str | Path,
    panel_inches: float = 1.6,
    dpi: int = 160,
) -> Path:
    """Write a PNG: a row per image; the input, then one column per model with its `pca_rgb` and the patch grid's size.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1].
        columns: title -> (features (N, h * w, C), grid (h, w)), in the order of the columns. Each model's features are
            stretched over its panel, as they cover the whole image. Colours compare within a column only.
        path: where the PNG goes; replaced in one step, so that a reader never meets half a file.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0 or not columns:
        raise ValueError(f"images are {tuple(images.shape)}; expected (N, 3, H, W) with N >= 1, and a column.")
    for title, (features, _) in columns.items():
        if len(features) != len(images):
            raise ValueError(f"{title!r} has features of {len(features)} images; expected {len(images)}.")
    pictures = {"Input": [image.permute(1, 2, 0).cpu() for image in images]}  # (3, H, W) -> (H, W, 3)
    subtitles = [f"{images.shape[3]} × {images.shape[2]} px"]
    for title, (features, (h, w)) in columns.items():
        pictures[title] = pca_rgb(list(features), [(h, w)] * len(images))
        subtitles.append(f"PCA, {w} × {h} patches")

    panel_height = panel_inches * images.shape[2] / images.shape[3]
    margin, gap, header = 0.12, 0.06, 0.42  # inches
    width = 2 * margin + len(pictures) * (panel_inches + gap) - gap
    height = 2 * margin + header + len(images) * (panel_height + gap) - gap
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    for column, (title, panels) in enumerate(pictures.items()):
        left = margin + column * (panel_inches + gap)
        middle = (left + panel_inches / 2) / width
        figure.text(middle, 1 - (margin + 0.1) / height, title, ha="center", va="center", size=10, weight="bold")
        subtitle_y = 1 - (margin + 0.28) / height
        figure.text(middle, subtitle_y, subtitles[column], ha="center", va="center", size=7, color="0.4")
        for row, panel in enumerate(panels):
            bottom = margin + (len(images) - 1 - row) * (panel_height + gap)
            axes = figure.add_axes((left / width, bottom / height, panel_inches / width, panel_height / height))
            axes.imshow(panel.numpy(), aspect="auto", interpolation="nearest" if column else "antialiased")
            axes.set_axis_off()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
    return path
