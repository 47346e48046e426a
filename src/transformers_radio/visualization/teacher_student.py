"""One picture of a teacher beside the student: the same images, features in a common basis."""

from collections.abc import Mapping
from pathlib import Path

import torch

from transformers_radio.evaluation.pca import fit_pca, pca_rgb

from .panels import Column, photographs, write_panels


def teacher_student_figure(
    images: torch.Tensor,
    columns: Mapping[str, tuple[torch.Tensor, tuple[int, int]]],
    path: str | Path,
    panel_inches: float = 1.6,
    dpi: int = 160,
    basis_of: Mapping[str, str] | None = None,
    basis_per_image: bool = False,
) -> Path:
    """Writes a PNG: a row per image; the input, then a column per model with its `pca_rgb` and the patch grid's size.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1].
        columns: title -> (features (N, h * w, C), grid (h, w)), in the order of the columns. Each model's features are
            stretched over its panel, as they cover the whole image. Colors compare within a column only, or between
            columns of one basis.
        path: of the PNG, which is written whole.
        basis_of: title -> title of the column whose basis and colors it takes: for features in one space, such as a
            teacher's and those of the student's adaptor to it.
        basis_per_image: each image has its own basis, so that colors compare within a panel only.

    Raises:
        ValueError: no image or column, features of other images, or a basis of another width.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0 or not columns:
        raise ValueError(f"images are {tuple(images.shape)}; expected (N, 3, H, W) with N >= 1, and a column.")
    basis_of = basis_of or {}
    for title, (features, _) in columns.items():
        if len(features) != len(images):
            raise ValueError(f"{title!r} has features of {len(features)} images; expected {len(images)}.")
        owner = basis_of.get(title, title)
        if owner not in columns or columns[owner][0].shape[-1] != features.shape[-1]:
            widths = {name: one.shape[-1] for name, (one, _) in columns.items()}
            raise ValueError(
                f"{title!r} cannot take the basis of {owner!r}, as the widths of the features are {widths}: only "
                "features of one space have a basis in common, such as a teacher's and those of the student's adaptor."
            )
    shown = [photographs(list(images))]
    for title, (features, (h, w)) in columns.items():
        owner = basis_of.get(title, title)
        named = f"basis of {owner}" if owner != title else "PCA"
        groups = [[number] for number in range(len(images))] if basis_per_image else [list(range(len(images)))]
        panels = []
        for group in groups:
            basis = fit_pca([columns[owner][0][number] for number in group])
            panels += pca_rgb([features[number] for number in group], [(h, w)] * len(group), basis)
        shown.append(Column(title, f"{named}, {w} × {h} patches", panels))
    return write_panels(shown, path, panel_inches=panel_inches, dpi=dpi)
