"""COCO's mask AP as a metric: a case counted by hand, and its rules written out plainly on random rectangles."""

import evaluate
import numpy as np
import pytest
import torch

from transformers_radio.evaluation.sam_coco.coco import encode_mask
from transformers_radio.evaluation.sam_coco.metrics import MaskAveragePrecision

SIDE = 260
SIZES = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def mask(x0, y0, x1, y1):
    found = np.zeros((SIDE, SIDE), dtype=bool)
    found[y0:y1, x0:x1] = True
    return found


def truth(category, pixels, iscrowd=0):
    rle = encode_mask(torch.from_numpy(pixels))
    return {"category_id": category, "area": int(pixels.sum()), "iscrowd": iscrowd, "segmentation": rle}


def detection(category, score, pixels):
    return {"category_id": category, "score": score, "segmentation": encode_mask(torch.from_numpy(pixels))}


def image(*annotations):
    return {"height": SIDE, "width": SIDE, "annotations": list(annotations)}


def test_small_medium_and_large_objects_counted_by_hand():
    metric = MaskAveragePrecision()
    assert isinstance(metric, evaluate.Metric)
    small, medium, large = mask(0, 0, 20, 20), mask(30, 30, 80, 80), mask(100, 100, 200, 200)
    metric.add(
        # the small one exactly, the medium one not at all, of the large one 82 rows of 100: an IoU of 0.82
        prediction=[detection(1, 0.9, small), detection(7, 0.8, mask(100, 100, 200, 182))],
        reference=image(truth(1, small), truth(3, medium), truth(7, large)),
    )
    assert len(metric) == 1
    assert metric.compute() == {
        "AP": pytest.approx(170 / 3),  # mean of the three categories
        "AP50": pytest.approx(200 / 3),
        "AP75": pytest.approx(200 / 3),
        "AP_small": pytest.approx(100),
        "AP_medium": pytest.approx(0),
        "AP_large": pytest.approx(70),  # 0.82 reaches seven of the ten thresholds, 0.50 to 0.80
    }
    # begun anew, without a medium or large object
    found = metric.compute(predictions=[[detection(1, 0.9, small)]], references=[image(truth(1, small))])
    assert found == {name: pytest.approx(100) for name in ("AP", "AP50", "AP75", "AP_small")}


def literal_ap(examples, thresholds, low, high):
    """Of COCO's rules: greedy matches by score; what is of another size or a crowd neither counts nor harms."""
    each = []
    for category in (1, 2, 3):
        for threshold in thresholds:
            outcomes, objects = [], 0
            for found, true in examples:
                true = [one for one in true if one["category"] == category]
                for one in true:
                    one["counts"] = not one["crowd"] and low <= one["mask"].sum() <= high
                    one["taken"] = False
                objects += sum(one["counts"] for one in true)
                for guess in sorted(found, key=lambda one: -one["score"]):
                    if guess["category"] != category:
                        continue
                    free = []
                    for one in true:
                        overlap = (guess["mask"] & one["mask"]).sum()
                        whole = guess["mask"] if one["crowd"] else guess["mask"] | one["mask"]
                        if overlap / whole.sum() >= threshold and (one["crowd"] or not one["taken"]):
                            free.append((one["counts"], overlap / whole.sum(), one))
                    counting, _, best = max(free, key=lambda one: one[:2], default=(False, 0, None))
                    if best is not None:
                        best["taken"] = True
                    if counting or (best is None and low <= guess["mask"].sum() <= high):
                        outcomes.append((guess["score"], counting))
            if not objects:
                continue
            hits = np.cumsum([hit for _, hit in sorted(outcomes, key=lambda one: -one[0])])
            precision, recall = hits / np.arange(1, len(hits) + 1), hits / objects
            reached = [precision[recall >= level] for level in np.linspace(0, 1, 101)]
            each.append(np.mean([part.max() if len(part) else 0 for part in reached]))
    return 100 * np.mean(each)


def test_random_images_equal_the_rules_written_out():
    rng = np.random.default_rng(0)
    metric, examples = MaskAveragePrecision(), []
    for _ in range(12):
        true, found = [], []
        for number in range(rng.integers(1, 7)):
            side = int(rng.choice([rng.integers(8, 28), rng.integers(36, 90), rng.integers(100, 140)]))
            x, y = (int(place) for place in rng.integers(0, SIDE - side - 12, 2))
            crowd, category = int(number == 3), int(rng.integers(1, 4))
            pixels = mask(x, y, x + side, y + side)
            true.append({"category": category, "mask": pixels, "crowd": crowd})
            for _ in range(rng.integers(0, 3)):  # missed, found, found twice; perhaps as another category
                dx, dy = (int(shift) for shift in rng.integers(0, 2 + side // 8, 2))
                said = category if rng.random() < 0.8 else int(rng.integers(1, 4))
                near = mask(x + min(dx, 12), y, x + side, y + side - min(dy, 12))
                found.append({"category": said, "mask": near, "score": rng.random()})
        examples.append((found, true))
        metric.add(
            prediction=[detection(one["category"], one["score"], one["mask"]) for one in found],
            reference=image(*(truth(one["category"], one["mask"], one["crowd"]) for one in true)),
        )
    expected = {f"AP{size}": literal_ap(examples, THRESHOLDS, *limits) for size, limits in SIZES.items()}
    expected |= {f"AP{name}": literal_ap(examples, [name / 100], *SIZES[""]) for name in (50, 75)}
    assert metric.compute() == pytest.approx(expected, abs=1e-6)
    assert len(set(expected.values())) == 6 and all(5 < one < 95 for one in expected.values())


def test_nothing_to_score_is_named():
    metric = MaskAveragePrecision()
    pixels = mask(0, 0, 20, 20)
    metric.add(prediction=[detection(1, 0.5, pixels)], reference=image(truth(1, pixels, iscrowd=1)))
    with pytest.raises(ValueError, match="1 images have no annotated object"):
        metric.compute()
    metric = MaskAveragePrecision()
    metric.add(prediction=[], reference=image(truth(1, pixels)))
    with pytest.raises(ValueError, match="Nothing was detected on 1 images"):
        metric.compute()
