"""Mean intersection over union as a metric of the `evaluate` library, and the counts behind it.

The counting is mmsegmentation's: one table of true and predicted pixels for all images, not a mean over images; pixels
of `ignore_index` do not count, whatever was predicted there; a class that is in neither the labels nor the predictions
leaves the mean.
"""

import math
from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric, total

IGNORE_INDEX = 255
LABEL_MAP = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))


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
    """The scores, in percent, of a table of counts (num_classes, num_classes), [true, predicted].

    Returns:
        mIoU: mean of IoU over the classes that have one.
        mAcc: mean over the labeled classes of the share of their pixels that is right.
        aAcc: share of all pixels that is right.
        IoU: per class, intersection over union; None for a class that is in neither the labels nor the predictions.

    Raises:
        ValueError: nothing was counted.
    """
    counts = confusion.double().cpu()
    if not counts.sum():
        raise ValueError("No labeled pixel was counted, so there is no score; check ignore_index and reduce_labels.")
    right, labeled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou = right / (labeled + predicted - right)  # 0 / 0 is NaN: the class does not occur
    accuracy = right / labeled
    return {
        "mIoU": 100 * iou.nanmean().item(),
        "mAcc": 100 * accuracy.nanmean().item(),
        "aAcc": 100 * (right.sum() / labeled.sum()).item(),
        "IoU": [None if math.isnan(value) else 100 * value for value in iou.tolist()],
    }


class MeanIoU(CountingMetric):
    """mIoU, mAcc, aAcc and IoU per class, in percent (see `iou_scores`), of label maps: arrays, lists or tensors.

    Label maps are (H, W), or pixels of them in any other shape. The metric takes num_classes^2 numbers of memory,
    whatever the size of the split.

        metric = MeanIoU(num_classes=150, reduce_labels=True)
        for predictions, references in batches:
            metric.add_batch(predictions=predictions, references=references)
        metric.compute()["mIoU"]

    Args:
        num_classes: classes are 0 to num_classes - 1, in predictions and (reduced) references.
        ignore_index: reference pixels of this value do not count.
        reduce_labels: references are numbered from 1 and 0 is "no class", as in ADE20K (see `reduce_labels`).
            Predictions are never changed.
    """

    description = "Mean intersection over union over the classes of a whole split, counted as mmsegmentation."
    inputs = "Label maps (H, W) of integer classes, whose sizes may differ from image to image."
    schema = {"predictions": LABEL_MAP, "references": LABEL_MAP}

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, reduce_labels: bool = False):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reduce_labels = reduce_labels
        super().__init__()

    def _reset(self) -> None:
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)  # [true, predicted]
        self.images = 0
        self.pixels = 0  # those that do not count included

    def __len__(self) -> int:
        return self.images

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one image (H, W).

        Raises:
            ValueError: shapes or classes that do not fit.
        """
        labels = torch.as_tensor(reference)
        if self.reduce_labels:
            labels = reduce_labels(labels, self.ignore_index)
        predicted = torch.as_tensor(prediction, device=labels.device)
        self.confusion += confusion_matrix(predicted, labels, self.num_classes, self.ignore_index).cpu()
        self.images += 1
        self.pixels += labels.numel()

    def sum_over_processes(self) -> None:
        """Adds up what the processes of `accelerate launch` have counted, a share each; all have to call it."""
        self.confusion = total(self.confusion)
        self.images, self.pixels = total(torch.tensor([self.images, self.pixels])).tolist()

    def _scores(self) -> dict[str, Any]:
        return iou_scores(self.confusion)
