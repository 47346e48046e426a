"""Masks in the figure against segment_anything's own predictor."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from helpers.tiny_sam import as_batch, make_student, picture, predictor_masks, some_boxes
from transformers_radio.evaluation.sam_coco.prompting import SamEncoder, StudentEncoder
from transformers_radio.visualization import masks as visualize_masks
from transformers_radio.visualization.masks import masks_figure

SIZES = [(40, 56), (70, 50)]


@pytest.fixture
def columns(monkeypatch):
    """What the figure is made of, besides the file."""
    seen = []
    write = visualize_masks.write_panels

    def write_and_keep(columns, *args, **options):
        seen.extend(columns)
        return write(columns, *args, **options)

    monkeypatch.setattr(visualize_masks, "write_panels", write_and_keep)
    return seen


def test_panels_are_tinted_exactly_where_sam_s_predictor_has_masks(sam, columns, tmp_path):
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    boxes = [some_boxes(size, 3, seed) for seed, size in enumerate(SIZES)]
    student = StudentEncoder(make_student(), sam)
    encoders = {"same": SamEncoder(sam), "student": student}
    path = masks_figure([as_batch(image)[0] for image in images], boxes, sam, encoders, tmp_path / "masks.png")
    assert path.stat().st_size > 10_000
    assert [column.title for column in columns] == ["Input", "SAM", "same", "student"]
    assert columns[2].subtitle == "mean IoU with SAM 100.0"
    predictor = SamPredictor(sam)
    own, ious = [], []
    for number, image in enumerate(images):
        predictor.set_image(image)
        masks, _ = predictor_masks(predictor, boxes[number], best_of_three=False)
        own.append(masks[:, 0] if masks.ndim == 4 else masks)
        changed = (columns[1].panels[number] - torch.from_numpy(image) / 255).abs().sum(dim=2) > 1e-3
        assert 0 < changed.float().mean() < 1
        assert torch.equal(changed, own[-1].any(dim=0))
        # the predictor's decoder behind the student's embedding
        predictor.features = student(as_batch(image))
        masks, _ = predictor_masks(predictor, boxes[number], best_of_three=False)
        theirs = (masks[:, 0] if masks.ndim == 4 else masks).numpy()
        for mine, other in zip(own[-1].numpy(), theirs, strict=True):
            union = (mine | other).sum()
            ious.append((mine & other).sum() / union if union else 1.0)
    assert columns[3].subtitle == f"mean IoU with SAM {100 * np.mean(ious):.1f}"


@pytest.mark.parametrize("box", [[0, 0, 57, 10], [-1, 0, 5, 5], [5, 5, 5, 9], [4, 9, 8, 9]])
def test_boxes_outside_their_image_or_empty_are_refused(sam, tmp_path, box):
    image = as_batch(picture((40, 56)))[0]
    with pytest.raises(ValueError, match=r"boxes of image 1 .* x1 <= 56 and 0 <= y0 < y1 <= 40"):
        masks_figure([image, image], [np.array([[0, 0, 56, 40.0]]), np.array([box])], sam, {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one"):
        masks_figure([image], [np.empty((0, 4))], sam, {}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
