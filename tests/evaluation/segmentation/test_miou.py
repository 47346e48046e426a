"""Counts, scores and the metric against literal counts pixel by pixel; and against mmsegmentation's rules by hand."""

import math

import evaluate
import numpy as np
import pytest
import torch

from transformers_radio.evaluation.segmentation.miou import MeanIoU, confusion_matrix, iou_scores, reduce_labels


def literal_scores(pairs, num_classes, ignore):
    """One pixel at a time, over all images."""
    right, predicted, labeled = ([0] * num_classes for _ in range(3))
    for predictions, labels in pairs:
        for row in range(labels.shape[0]):
            for column in range(labels.shape[1]):
                guess, true = int(predictions[row, column]), int(labels[row, column])
                if true == ignore:
                    continue
                predicted[guess] += 1
                labeled[true] += 1
                right[true] += guess == true
    iou = {
        k: right[k] / (predicted[k] + labeled[k] - right[k]) for k in range(num_classes) if predicted[k] + labeled[k]
    }
    accuracy = [right[k] / labeled[k] for k in range(num_classes) if labeled[k]]
    return {
        "mIoU": 100 * sum(iou.values()) / len(iou),
        "mAcc": 100 * sum(accuracy) / len(accuracy),
        "aAcc": 100 * sum(right) / sum(labeled),
        "IoU": [100 * iou[k] if k in iou else None for k in range(num_classes)],
    }


@pytest.mark.parametrize("ignore", [255, 4])
def test_scores_equal_a_literal_count_over_images_of_several_sizes(ignore):
    rng = np.random.default_rng(0)
    # Class 5 occurs nowhere, class 6 only among the predictions.
    pairs = [
        (rng.choice([0, 1, 2, 3, 6], size), rng.choice([0, 1, 2, 3, ignore], size, p=[0.5, 0.2, 0.1, 0.1, 0.1]))
        for size in ((6, 9), (11, 4), (1, 1), (8, 8))
    ]
    confusion = sum(
        confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(labels).to(torch.uint8), 7, ignore)
        for predicted, labels in pairs
    )
    scores, expected = iou_scores(confusion), literal_scores(pairs, 7, ignore)
    assert scores["IoU"][5] is None and scores["IoU"][6] == 0 and scores["IoU"][4] is None
    assert scores == {name: pytest.approx(value, nan_ok=False) for name, value in expected.items()}
    assert int(confusion.sum()) == sum((labels != ignore).sum() for _, labels in pairs)


def test_one_table_for_the_split_is_not_a_mean_over_images():
    first = (torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1]]))
    second = (torch.tensor([[1]]), torch.tensor([[1]]))
    scores = iou_scores(confusion_matrix(*first, 2) + confusion_matrix(*second, 2))
    assert scores["IoU"] == pytest.approx([75, 50])  # the images alone would have 75, 0 and 100
    assert math.isclose(scores["mAcc"], 75) and math.isclose(scores["aAcc"], 80)


def test_reduced_labels_are_ade20ks():
    labels = torch.tensor([[0, 1, 150, 255]], dtype=torch.uint8)
    assert reduce_labels(labels).tolist() == [[255, 0, 149, 255]]
    assert reduce_labels(torch.tensor([0, 1, 300, 65535]), 65535).tolist() == [65535, 0, 299, 65535]


def test_bad_counts_are_named():
    zeros = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\).*resize the logits"):
        confusion_matrix(zeros, torch.zeros(2, 3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="A label is 2, but there are 2 classes"):
        confusion_matrix(zeros, zeros + 2, 2)
    with pytest.raises(ValueError, match="A prediction is -1"):
        confusion_matrix(zeros - 1, zeros, 2)
    with pytest.raises(ValueError, match="No labeled pixel"):
        iou_scores(confusion_matrix(zeros + 7, zeros + 255, 2))


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
    with pytest.raises(ValueError, match="No labeled pixel"):
        metric.compute()
    with pytest.raises(ValueError, match="A label is 3, but there are 3 classes"):
        metric.add(prediction=[[0]], reference=[[3]])
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 1\)"):
        metric.add(prediction=[[0, 1]], reference=[[0]])
    with pytest.raises(ValueError, match="num_classes is 0"):
        MeanIoU(num_classes=0)
