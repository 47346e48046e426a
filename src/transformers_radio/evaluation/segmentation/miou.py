"""Mean intersection over union as a metric of the `evaluate` library."""

from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric

from .confusion import IGNORE_INDEX, confusion_matrix, iou_scores, reduce_labels

LABEL_MAP = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))


class MeanIoU(CountingMetric):
    """mIoU, mAcc, aAcc and IoU per class, in percent (see `iou_scores`), of label maps (H, W): arrays, lists, tensors.

    Whatever the size of the split, it takes num_classes^2 numbers of memory.

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
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self.images = 0

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

    def _scores(self) -> dict[str, Any]:
        return iou_scores(self.confusion)
