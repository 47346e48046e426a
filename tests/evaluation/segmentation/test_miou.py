"""The metric of the `evaluate` library against a literal count, pixel by pixel."""

import evaluate
import numpy as np
import pytest
import torch

from transformers_radio.evaluation.segmentation.miou import MeanIoU


def test_batches_and_single_images_of_any_size_are_one_count_over_the_split():
    rng = np.random.default_rng(0)
    references = [rng.choice([0, 1, 2, 3, 255], size) for size in ((5, 7), (5, 7), (3, 4), (9, 2))]
    predictions = [rng.integers(0, 3, reference.shape) for reference in references]
    right, union = [0, 0, 0], [0, 0, 0]
    for predicted, reference in zip(predictions, references, strict=True):
        for guess, true in zip(predicted.ravel().tolist(), reference.ravel().tolist(), strict=True):
            if true in (0, 255):  # reduce_labels: 0 is no class
                continue
            for one in range(3):
                right[one] += guess == true - 1 == one
                union[one] += one in (guess, true - 1)
    metric = MeanIoU(num_classes=3, reduce_labels=True)
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=np.stack(predictions[:2]), references=torch.from_numpy(np.stack(references[:2])))
    metric.add(prediction=predictions[2].tolist(), reference=references[2].tolist())
    assert len(metric) == 3
    scores = metric.compute(predictions=predictions[3:], references=references[3:])
    assert scores["IoU"] == pytest.approx([100 * r / u for r, u in zip(right, union, strict=True)])
    assert scores["mIoU"] == pytest.approx(sum(scores["IoU"]) / 3)
    assert len(metric) == 0  # the next split begins anew
    assert metric.compute(predictions=[[[0]]], references=[[[1]]])["IoU"] == [100.0, None, None]


def test_bad_input_is_named():
    metric = MeanIoU(num_classes=3)
    with pytest.raises(ValueError, match="No labelled pixel"):
        metric.compute()
    with pytest.raises(ValueError, match="A label is 3, but there are 3 classes"):
        metric.add(prediction=[[0]], reference=[[3]])
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 1\)"):
        metric.add(prediction=[[0, 1]], reference=[[0]])
    with pytest.raises(ValueError, match="num_classes is 0"):
        MeanIoU(num_classes=0)
