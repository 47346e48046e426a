"""Pixels counted by true and predicted class over a whole split, and the scores that follow from the counts.

The counting is mmsegmentation's: one table for all images, not a mean over images; pixels of `ignore_index` do not
count, whatever was predicted there; a class that is neither in the labels nor in the predictions leaves the mean.
"""

import math
from typing import Any

import torch

IGNORE_INDEX = 255


def reduce_labels(labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """ADE20K's numbering, in which 0 is "no class", to class indices: 0 -> ignore_index, k -> k - 1.

    Pixels that already are `ignore_index` stay so. Any integer dtype and shape; returns int64.
    """
    labels = labels.long()
    return torch.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)


def confusion_matrix(
    predictions: torch.Tensor, labels: torch.Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Counts int64 (num_classes, num_classes), [true, predicted]; add those of several images to score them together.

    Args:
        predictions, labels: integers of one shape, on one device.

    Raises:
        ValueError: shapes that differ; a class outside 0 .. num_classes - 1 among the pixels that count.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"The prediction is {tuple(predictions.shape)} and the label map {tuple(labels.shape)}; they must be of "
            "one size: resize the logits to the label map before the arg-max."
        )
    counted = labels != ignore_index
    true, predicted = labels[counted].long(), predictions[counted].long()
    for name, values in (("label", true), ("prediction", predicted)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"A {name} is {wrong[0].item()}, but there are {num_classes} classes (0 to {num_classes - 1}) and "
                f"only labels of {ignore_index} are left out; check num_classes, ignore_index and reduce_labels."
            )
    # (pixels,) -> (num_classes * num_classes,) -> (num_classes, num_classes)
    counts = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def iou_scores(confusion: torch.Tensor) -> dict[str, Any]:
    """Scores in percent of a table of counts (num_classes, num_classes), [true, predicted].

    Returns:
        mIoU: mean of IoU over the classes that have one.
        mAcc: mean over the labelled classes of the share of their pixels that is right.
        aAcc: share of all pixels that is right.
        IoU: per class, intersection over union; None for a class in neither labels nor predictions.

    Raises:
        ValueError: nothing was counted.
    """
    counts = confusion.double().cpu()
    if not counts.sum():
        raise ValueError("No labelled pixel was counted, so there is no score; check ignore_index and reduce_labels.")
    right, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou = right / (labelled + predicted - right)  # 0 / 0 is NaN: the class does not occur
    accuracy = right / labelled
    return {
        "mIoU": 100 * iou.nanmean().item(),
        "mAcc": 100 * accuracy.nanmean().item(),
        "aAcc": 100 * (right.sum() / labelled.sum()).item(),
        "IoU": [None if math.isnan(value) else 100 * value for value in iou.tolist()],
    }
