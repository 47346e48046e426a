"""Mean IoU of single masks as a metric of the `evaluate` library."""

from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric

from .prompting import mask_overlap

MASK = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))


class MeanMaskIoU(CountingMetric):
    """Mean over mask pairs of intersection over union, in percent; masks (H, W) are arrays, lists or tensors.

    It is the SAM-COCO figure when predictions are the masks of box prompts and references the annotated masks.
    An empty reference is left out and counted.

        metric = MeanMaskIoU()
        for predictions, references in batches:
            metric.add_batch(predictions=predictions, references=references)
        metric.compute()  # {"mean_mask_iou": 77.2, "masks": 36335, "empty": 0}
    """

    description = "Mean intersection over union of pairs of masks, in percent."
    inputs = "Boolean masks (H, W), whose sizes may differ from pair to pair."
    schema = {"predictions": MASK, "references": MASK}

    def _reset(self) -> None:
        self.scores: list[float] = []
        self.empty = 0

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one pair (H, W).

        Raises:
            ValueError: masks of two shapes.
        """
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

    def _scores(self) -> dict[str, float]:
        if not self.scores:
            raise ValueError(f"There is no mask to score ({self.empty} references were empty); add some first.")
        return {
            "mean_mask_iou": 100 * sum(self.scores) / len(self.scores),
            "masks": len(self.scores),
            "empty": self.empty,
        }
