"""What the metrics of the `evaluate` library here have in common: they count, and keep nothing that they count."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate


class CountingMetric(evaluate.Metric):
    """Examples are counted as they are added, so that a split of any size fits; needs no network.

    A metric has `description`, `inputs` and `schema`, what `evaluate` says of it, and `_reset`, `add` and `_scores`.
    """

    description = ""
    inputs = ""
    schema: dict[str, Any] = {}  # of `datasets`, for "predictions" and "references"

    def __init__(self) -> None:
        self._reset()
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(self.schema),
        )

    def _reset(self) -> None:
        """Forget what was counted."""
        raise NotImplementedError

    def _scores(self) -> dict[str, Any]:
        """Of what was counted. ValueError where there is nothing to score."""
        raise NotImplementedError

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one example."""
        raise NotImplementedError

    def add_batch(self, *, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Counts several.

        Raises:
            ValueError: another number of predictions than references, or what `add` refuses.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None
    ) -> dict[str, Any]:
        """Scores of all examples since the last `compute`, those given here included.

        Raises:
            ValueError: there is nothing to score.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self._scores()
        self._reset()
        return scores
