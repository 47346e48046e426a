"""Mean intersection over union as a metric of the `evaluate` library."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import torch

from .confusion import IGNORE_INDEX, confusion_matrix, iou_scores, reduce_labels

Maps = Iterable[Any]  # of (H, W) arrays, lists or tensors


class MeanIoU(evaluate.Metric):
    """mIoU, mAcc, aAcc and IoU per class, in percent (see `iou_scores`); needs no network.

    Images are counted as they are added and not kept, so a split of any size takes num_classes^2 numbers of memory.

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

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, reduce_labels: bool = False):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reduce_labels = reduce_labels
        self._reset()
        super().__init__()

    def _reset(self) -> None:
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self.images = 0

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union over the classes of a whole split, counted as mmsegmentation.",
            citation="",
            inputs_description="Label maps (H, W) of integer classes, whose sizes may differ from image to image.",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def __len__(self) -> int:
        return self.images

    def add_batch(self, *, predictions: Maps, references: Maps) -> None:
        """Counts images: (B, H, W), or any sequence of (H, W).

        Raises:
            ValueError: another number of predictions than references, shapes or classes that do not fit.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one image (H, W)."""
        labels = torch.as_tensor(reference)
        if self.reduce_labels:
            labels = reduce_labels(labels, self.ignore_index)
        predicted = torch.as_tensor(prediction, device=labels.device)
        self.confusion += confusion_matrix(predicted, labels, self.num_classes, self.ignore_index).cpu()
        self.images += 1

    def compute(self, *, predictions: Maps | None = None, references: Maps | None = None) -> dict[str, Any]:
        """Scores of all images since the last `compute`, those given here included.

        Raises:
            ValueError: no pixel that counts was added.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = iou_scores(self.confusion)
        self._reset()
        return scores
