"""k-NN and zero-shot accuracy as metrics of the `evaluate` library."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric
from transformers_radio.evaluation.images.labelled import check_labelled

from .knn import knn_predictions
from .zero_shot import check_classifier, zero_shot_predictions

Rows = torch.Tensor | Sequence[Any]  # (N, D) tensor, array or lists


class _SummaryAccuracy(CountingMetric):
    """Percent of summaries whose predicted class is the reference."""

    name_of_score = ""
    inputs = "predictions: summaries (N, D) of images; references: class indices (N,)."
    schema = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        super().__init__()

    def _reset(self) -> None:
        self.correct = self.images = 0

    def _predict(self, summaries: torch.Tensor) -> torch.Tensor:
        """(N, D) -> int64 (N,)"""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.images

    def add_batch(self, *, predictions: Rows, references: Rows) -> None:  # type: ignore[override]
        """Counts images: summaries (N, D) and class indices (N,).

        Raises:
            ValueError: shapes that do not fit, summaries that are not finite, a class that is not there.
        """
        summaries, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        check_labelled(summaries, labels, "summaries")
        if labels.max() >= self.num_classes:
            raise ValueError(f"A label is {labels.max()}, but there are only {self.num_classes} classes.")
        self.correct += int((self._predict(summaries) == labels.to(summaries.device)).sum())
        self.images += len(labels)

    def add(self, *, prediction: Any, reference: int) -> None:
        """Counts one image: its summary (D,) and class index."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor([reference]))

    def _scores(self) -> dict[str, float]:
        if not self.images:
            raise ValueError("There is no image to score; add some first.")
        return {self.name_of_score: 100 * self.correct / self.images, "images": self.images}


class KnnAccuracy(_SummaryAccuracy):
    """k-NN accuracy as in `knn_accuracy`.

        metric = KnnAccuracy(bank, bank_labels)
        for images, labels in batches:
            metric.add_batch(predictions=encoder.summary(images), references=labels)
        metric.compute()  # {"knn_accuracy": 83.4, "images": 50000}

    Args:
        bank: (N, D) summaries of any scale. Each batch is compared with all of them, so make batches large.
        bank_labels: integers (N,), from 0.
        num_classes: one more than the largest label of the bank unless given.
        chunk_size: rows of the bank that are compared at once.
    """

    name_of_score = "knn_accuracy"
    description = "Accuracy of a weighted k-NN vote over cosine similarities of summaries, in percent."

    def __init__(
        self,
        bank: torch.Tensor,
        bank_labels: torch.Tensor,
        k: int = 20,
        temperature: float = 0.07,
        num_classes: int | None = None,
        chunk_size: int = 65536,
    ):
        check_labelled(bank, bank_labels, "bank vectors")
        if not 1 <= k <= len(bank):
            raise ValueError(f"k is {k}; expected 1 to {len(bank)}, the number of bank vectors.")
        if temperature <= 0 or chunk_size < 1:
            raise ValueError(f"temperature ({temperature}) must be above 0 and chunk_size ({chunk_size}) at least 1.")
        self.bank, self.bank_labels, self.k = bank, bank_labels, k
        self.temperature, self.chunk_size = temperature, chunk_size
        super().__init__(int(bank_labels.max()) + 1 if num_classes is None else num_classes)

    def _predict(self, summaries: torch.Tensor) -> torch.Tensor:
        if summaries.shape[1] != self.bank.shape[1]:
            raise ValueError(
                f"The bank has {self.bank.shape[1]} dimensions, the summaries {summaries.shape[1]}: use one encoder."
            )
        chunks = zip(self.bank.split(self.chunk_size), self.bank_labels.split(self.chunk_size), strict=True)
        device = summaries.device
        return knn_predictions(chunks, [summaries], self.k, self.temperature, self.num_classes, device)[0]


class ZeroShotAccuracy(_SummaryAccuracy):
    """Zero-shot accuracy as in `zero_shot_accuracy`.

        metric = ZeroShotAccuracy(zero_shot_classifier(text_encoder, class_names, templates))
        for images, labels in batches:
            metric.add_batch(predictions=encoder.language(images), references=labels)
        metric.compute()  # {"zero_shot_accuracy": 76.9, "images": 50000}

    Args:
        classifier: (C, D) from `zero_shot_classifier`.
    """

    name_of_score = "zero_shot_accuracy"
    description = "Accuracy of the class whose text embedding is most similar to an image's summary, in percent."

    def __init__(self, classifier: torch.Tensor):
        check_classifier(classifier, classifier.shape[-1])
        self.classifier = classifier
        super().__init__(len(classifier))

    def _predict(self, summaries: torch.Tensor) -> torch.Tensor:
        check_classifier(self.classifier, summaries.shape[1])
        return zero_shot_predictions(summaries, self.classifier)
