"""What our metrics of the `evaluate` library have in common: they count examples and keep none of them."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import reduce


class CountingMetric(evaluate.Metric):
    """Examples are counted as they are added, so that a split of any size fits; needs no network.

    A subclass sets `description`, `inputs` and `schema`, which `evaluate` shows, and defines `_reset`, `add` and
    `_scores`.
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
        """Forgets what was counted."""
        raise NotImplementedError

    def _scores(self) -> dict[str, Any]:
        """The scores of what was counted. ValueError where there is nothing to score."""
        raise NotImplementedError

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Counts one example."""
        raise NotImplementedError

    def add_batch(self, *, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Counts several examples.

        Raises:
            ValueError: another number of predictions than references, or what `add` refuses.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None
    ) -> dict[str, Any]:
        """The scores of all examples since the last `compute`, those given here included.

        Raises:
            ValueError: there is nothing to score.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self._scores()
        self._reset()
        return scores


def total(counts: torch.Tensor) -> torch.Tensor:
    """The sum of these counts over all processes of `accelerate launch`, on the CPU; every process has to call it."""
    return reduce(counts.to(PartialState().device), "sum").cpu()
