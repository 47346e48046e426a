"""Counting right classes, whichever way they are predicted: what the metrics of k-NN and zero-shot share."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric, total

Rows = torch.Tensor | Sequence[Any]  # (N, D) tensor, array or lists


class SummaryAccuracy(CountingMetric):
    """Percent of summaries whose predicted class is the reference. A subclass sets `score_name` and `_predict`."""

    score_name = ""
    inputs = "predictions: summaries (N, D) of images; references: class indices (N,)."
    schema = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        super().__init__()

    def _reset(self) -> None:
        self.correct = self.images = 0

    def _predict(self, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Summaries (N, D) -> class indices int64 (N,) on their device, for each block."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.images

    def add_blocks(self, blocks: Sequence[tuple[Rows, Rows]]) -> None:
        """Counts blocks of images, (summaries (N, D), class indices (N,)) each, which may have different sizes.

        Raises:
            ValueError: shapes that do not fit, summaries that are not finite, a class that is not there.
        """
        tensors = [(torch.as_tensor(summaries), torch.as_tensor(labels)) for summaries, labels in blocks]
        for summaries, labels in tensors:
            check_labeled(summaries, labels, "summaries")
            if labels.max() >= self.num_classes:
                raise ValueError(f"A label is {labels.max()}, but there are only {self.num_classes} classes.")
        predicted = self._predict([summaries for summaries, _ in tensors])
        for classes, (_, labels) in zip(predicted, tensors, strict=True):
            self.correct += int((classes == labels.to(classes.device)).sum())
            self.images += len(labels)

    def add_batch(self, *, predictions: Rows, references: Rows) -> None:  # type: ignore[override]
        """Counts images: summaries (N, D) and class indices (N,). Raises as `add_blocks`."""
        self.add_blocks([(predictions, references)])

    def add(self, *, prediction: Any, reference: int) -> None:
        """Counts one image: its summary (D,) and class index."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor([reference]))

    def sum_over_processes(self) -> None:
        """Adds up what the processes of `accelerate launch` have counted, a share each; all have to call it."""
        self.correct, self.images = total(torch.tensor([self.correct, self.images])).tolist()

    def _scores(self) -> dict[str, float]:
        if not self.images:
            raise ValueError("There is no image to score; add some first.")
        return {self.score_name: 100 * self.correct / self.images, "images": self.images}


def check_labeled(vectors: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    """ValueError unless `vectors` is finite (N, D) with N > 0 and `labels` holds N class indices from 0."""
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(f"The {name} have shape {tuple(vectors.shape)}; expected (N, D) with at least one row.")
    if labels.shape != vectors.shape[:1]:
        raise ValueError(f"There are {len(vectors)} {name} but labels of shape {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.min() < 0:
        raise ValueError(f"The labels of the {name} must be integers from 0; got {labels.dtype}, {labels.min()}.")
    if not vectors.isfinite().all():
        raise ValueError(f"The {name} hold NaN or infinite values; check the encoder that produced them.")
