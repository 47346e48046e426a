"""Mean IoU of single masks as a metric of the `evaluate` library."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import torch

from .prompted_masks import mask_overlap

Masks = Iterable[Any]  # of (H, W) arrays, lists or tensors of booleans


class MeanMaskIoU(evaluate.Metric):
    """Mean over mask pairs of intersection over union, in percent; needs no network.

    It is the SAM-COCO figure when predictions are the masks of box prompts and references the annotated masks.
    Masks are counted as they are added and not kept; an empty reference is left out and counted.

        metric = MeanMaskIoU()
        for predictions, references in batches:
            metric.add_batch(predictions=predictions, references=references)
        metric.compute()  # {"mean_mask_iou": 77.2, "masks": 36335, "empty": 0}
    """

    def __init__(self) -> None:
        self._reset()
        super().__init__()

    def _reset(self) -> None:
        self.scores: list[float] = []
        self.empty = 0

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
        return evaluate.MetricInfo(
            description="Mean intersection over union of pairs of masks, in percent.",
            citation="",
            inputs_description="Boolean masks (H, W), whose sizes may differ from pair to pair.",
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def add_batch(self, *, predictions: Masks, references: Masks) -> None:
        """Counts pairs: (B, H, W), or any sequence of (H, W).

        Raises:
            ValueError: another number of predictions than references, or a pair of two shapes.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one pair (H, W)."""
        truth = torch.as_tensor(reference).bool()
        guess = torch.as_tensor(prediction, device=truth.device).bool()
        if guess.shape != truth.shape or truth.ndim != 2:
            raise ValueError(
                f"The prediction is {tuple(guess.shape)} and the reference {tuple(truth.shape)}; expected two masks "
                "(H, W) of one size."
            )
        if not truth.any():
            self.empty += 1
            return
        intersection, union = mask_overlap(guess, truth)
        self.scores.append(intersection.item() / union.item())

    def compute(self, *, predictions: Masks | None = None, references: Masks | None = None) -> dict[str, float]:
        """Score of all pairs since the last `compute`, those given here included.

        Raises:
            ValueError: no reference with a pixel was added.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.scores:
            raise ValueError(f"There is no mask to score ({self.empty} references were empty); add some first.")
        scores = {
            "mean_mask_iou": 100 * sum(self.scores) / len(self.scores),
            "masks": len(self.scores),
            "empty": self.empty,
        }
        self._reset()
        return scores
