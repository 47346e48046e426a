"""A student's learned position table: its principal components, and how similar its places are."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes

from transformers_radio.evaluation.features.statistics import position_table
from transformers_radio.evaluation.pca import pca_rgb
from transformers_radio.modeling import RadioModel

from .panels import Column, heat, write_panels

# (down, across), as shares of the table
PLACES = {
    "Upper left": (1 / 6, 1 / 6),
    "Upper right": (1 / 6, 5 / 6),
    "Center": (1 / 2, 1 / 2),
    "Lower left": (5 / 6, 1 / 6),
    "Lower right": (5 / 6, 5 / 6),
}


def position_similarity(table: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Cosine similarity of one place's embedding to every place's, less the table's mean: (side, side) in [-1, 1].

    The mean is subtracted because it does not tell one place from another, yet would make all of them similar.
    """
    centered = F.normalize(table - table.mean(dim=(0, 1)), dim=2)
    return centered @ centered[row, column]


def positions_figure(models: Mapping[str, RadioModel], path: str | Path) -> Path:
    """Writes a PNG: a row per model; the PCA of its table, then the similarity of five places (crosses) to all others.

    Similarity is dark at -1 and bright at 1 in every panel, so panels compare.
    """
    tables: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        table = position_table(model)
        if table is None:
            raise ValueError(f"{name} has no position table to show.")
        tables[name] = table.float().cpu()
    sides = [len(table) for table in tables.values()]
    colors = [pca_rgb([table.flatten(0, 1)], [(len(table), len(table))])[0] for table in tables.values()]
    label = f"table of {sides[0]} × {sides[0]}" if len(set(sides)) == 1 else "the whole table"
    shown = [Column("Positions", f"PCA, {label}", colors)]
    for title, (down, across) in PLACES.items():
        places = [(int(down * side), int(across * side)) for side in sides]
        panels = [
            heat(position_similarity(table, *place), -1.0, 1.0)
            for table, place in zip(tables.values(), places, strict=True)
        ]

        def mark(axes: Axes, row: int, places: list[tuple[int, int]] = places) -> None:
            axes.plot(places[row][1], places[row][0], "+", color="white", markersize=8, markeredgewidth=2.4)
            axes.plot(places[row][1], places[row][0], "+", color="black", markersize=7, markeredgewidth=1)

        shown.append(Column(title, "cosine similarity, -1 to 1", panels, draw=mark))
    return write_panels(shown, path, row_titles=list(tables))
