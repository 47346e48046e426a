"""Masks for box prompts: SAM's own beside those of students in the place of its image encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from tqdm import tqdm

from transformers_radio.evaluation.figure_style import OBJECT_COLORS
from transformers_radio.evaluation.sam_coco.metrics import mask_overlap
from transformers_radio.evaluation.sam_coco.prompting import Encoder, SamEncoder, predict_masks

from .panels import Column, photographs, write_panels

MASK_SHARE = 0.6  # of the mask's color in the pixels of the mask


def masks_figure(
    images: Sequence[torch.Tensor],
    boxes: Sequence[np.ndarray],
    sam: Any,
    encoders: Mapping[str, Encoder],
    path: str | Path,
) -> Path:
    """Writes a PNG: a row per image; the input with its boxes, SAM's masks, then those with each encoder in its place.

    Above a student's column is the mean IoU of its masks with SAM's own (not with annotated masks).

    Args:
        images: uint8 (3, H, W), of any size.
        boxes: per image (N, 4), N >= 1; x0, y0, x1, y1 in pixels.
        sam: the whole SAM that decodes, see `teachers.segment_anything.load_sam`.
        encoders: title -> an encoder such as `StudentEncoder`.

    Raises:
        ValueError: an image without boxes, or a box that is not within its image.
    """
    for number, (image, ones) in enumerate(zip(images, boxes, strict=True)):
        height, width = image.shape[1:]
        inside = len(ones) and ((ones >= 0).all() and (ones[:, 2:] <= [width, height]).all())
        if not inside or not (ones[:, :2] < ones[:, 2:]).all():
            raise ValueError(
                f"The boxes of image {number} are {np.asarray(ones).tolist()}; expected at least one, each x0, y0, "
                f"x1, y1 in pixels with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}."
            )

    def draw_boxes(axes: Axes, row: int) -> None:
        for (x0, y0, x1, y1), color in zip(boxes[row], _colors(len(boxes[row])), strict=True):
            # a pixel's center has whole coordinates, a box's edges lie between pixels
            place = ((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0)
            axes.add_patch(Rectangle(*place, fill=False, edgecolor="black", linewidth=2.2))
            axes.add_patch(Rectangle(*place, fill=False, edgecolor=color, linewidth=1.2))

    shown = [photographs(list(images))]
    shown[0].draw = draw_boxes
    every: dict[str, Encoder] = {"SAM": SamEncoder(sam), **encoders}
    predicted: dict[str, list[torch.Tensor]] = {}
    for title, encoder in every.items():
        predicted[title] = []
        for image, box in tqdm(list(zip(images, boxes, strict=True)), desc=f"{title} masks", unit="image"):
            embedding = encoder(image[None].to(sam.device))
            masks, _ = predict_masks(sam, embedding, box, (image.shape[1], image.shape[2]))
            predicted[title].append(masks.cpu())
    for title, found in predicted.items():
        overlaps = [mask_overlap(one, own) for one, own in zip(found, predicted["SAM"], strict=True)]
        # two empty masks agree
        ious = torch.cat([torch.where(union > 0, inter / union.clamp(min=1), 1.0) for inter, union in overlaps])
        subtitle = f"mean IoU with SAM {100 * ious.mean().item():.1f}" if title in encoders else "its own encoder"
        panels = [overlay_masks(image, one) for image, one in zip(images, found, strict=True)]

        def draw_edges(axes: Axes, row: int, masks: list[torch.Tensor] = found) -> None:
            for mask, color in zip(masks[row], _colors(len(masks[row])), strict=True):
                if mask.any() and not mask.all():
                    axes.contour(mask.float().numpy(), levels=[0.5], colors=[color], linewidths=1.2)

        shown.append(Column(title, subtitle, panels, smooth=True, draw=draw_edges))
    return write_panels(shown, path, panel_inches=2.0)


def overlay_masks(image: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) and bool (N, H, W) -> float (H, W, 3): each object's mask in its color, smaller ones on top."""
    picture = image.cpu().permute(1, 2, 0).float() / 255  # (3, H, W) -> (H, W, 3)
    colors = torch.tensor([to_rgb(color) for color in _colors(len(masks))])
    result = picture.clone()
    for number in masks.sum(dim=(1, 2)).argsort(descending=True).tolist():
        mask = masks[number]
        result[mask] = MASK_SHARE * colors[number] + (1 - MASK_SHARE) * picture[mask]
    return result


def _colors(count: int) -> list[str]:
    return [OBJECT_COLORS[number % len(OBJECT_COLORS)] for number in range(count)]
