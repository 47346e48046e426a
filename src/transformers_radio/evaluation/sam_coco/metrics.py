"""Metrics of masks for the `evaluate` library: the mean IoU of single masks, and COCO's average precision."""

import importlib
from typing import Any

import datasets
import torch

from transformers_radio.evaluation.counting_metric import CountingMetric

from .coco import EXTRA

MASK = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
# ours -> faster-coco-eval's
AP_NAMES = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "AP_small": "AP_small",
    "AP_medium": "AP_medium",
    "AP_large": "AP_large",
}
RLE = {"size": datasets.Sequence(datasets.Value("int64")), "counts": datasets.Value("string")}
DETECTION = {"category_id": datasets.Value("int64"), "score": datasets.Value("float64"), "segmentation": RLE}
ANNOTATION = {
    "category_id": datasets.Value("int64"),
    "area": datasets.Value("float64"),
    "iscrowd": datasets.Value("int64"),
    "segmentation": RLE,
}


def mask_overlap(predictions: torch.Tensor, truths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in the intersection and in the union of boolean masks (..., H, W): two int64 tensors (...)."""
    return (predictions & truths).sum(dim=(-2, -1)), (predictions | truths).sum(dim=(-2, -1))


class MeanMaskIoU(CountingMetric):
    """Mean over mask pairs of intersection over union, in percent; masks (H, W) are arrays, lists or tensors.

    It is SAM-COCO's number when predictions are the masks of box prompts and references the annotated masks. An empty
    reference is left out and counted.

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
        self.add_overlap(int(intersection), int(union))

    def add_overlap(self, intersection: int, union: int) -> None:
        """Counts one pair whose intersection and union, in pixels, are known."""
        self.scores.append(intersection / union)

    def _scores(self) -> dict[str, float]:
        if not self.scores:
            raise ValueError(f"There is no mask to score ({self.empty} references were empty); add some first.")
        return {
            "mean_mask_iou": 100 * sum(self.scores) / len(self.scores),
            "masks": len(self.scores),
            "empty": self.empty,
        }


class MaskAveragePrecision(CountingMetric):
    """AP, AP50, AP75, AP_small, AP_medium and AP_large of COCO, in percent, counted by faster-coco-eval.

    An example is an image: its detections, and its size and annotations, all as COCO's files have them. The masks are
    kept, as run lengths or polygons. A size (small, medium, large) without an annotated object has no AP.

        metric = MaskAveragePrecision()
        for image in images:
            metric.add(
                prediction=[{"category_id": 3, "score": 0.9, "segmentation": rle}],
                reference={"height": 480, "width": 640, "annotations": image["annotations"]},
            )
        metric.compute()  # {"AP": 45.3, "AP50": ...}

    Raises:
        ImportError: faster-coco-eval is not installed.
    """

    description = "COCO's mean average precision of masks, in percent."
    inputs = "For each image: COCO results with masks; its height, width and COCO annotations."
    schema = {
        "predictions": datasets.Sequence(DETECTION),
        "references": {
            "height": datasets.Value("int64"),
            "width": datasets.Value("int64"),
            "annotations": datasets.Sequence(ANNOTATION),
        },
    }

    def __init__(self) -> None:
        average_precision_library()
        super().__init__()

    def _reset(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.detections: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.images)

    def add(self, *, prediction: list[dict[str, Any]], reference: dict[str, Any]) -> None:
        """Counts one image."""
        number = len(self.images) + 1
        self.images.append({"id": number, "height": reference["height"], "width": reference["width"]})
        for entry in reference["annotations"]:
            # COCO's counting takes an annotation with the id 0 for none
            mine = {"id": len(self.annotations) + 1, "image_id": number, "iscrowd": entry.get("iscrowd", 0)}
            self.annotations.append({key: entry[key] for key in ("category_id", "area", "segmentation")} | mine)
        for entry in prediction:
            # without a box, so that small, medium and large go by the mask's area
            found = {key: entry[key] for key in ("category_id", "score", "segmentation")}
            self.detections.append(found | {"image_id": number})

    def _scores(self) -> dict[str, float]:
        if all(entry["iscrowd"] for entry in self.annotations):
            raise ValueError(f"The {len(self.images)} images have no annotated object to find; add some first.")
        if not self.detections:
            raise ValueError(f"Nothing was detected on {len(self.images)} images, so there is nothing to score.")
        library = average_precision_library()
        categories = sorted({entry["category_id"] for entry in [*self.annotations, *self.detections]})
        content = {"images": self.images, "annotations": self.annotations}
        truth = library.COCO({**content, "categories": [{"id": number} for number in categories]})
        evaluation = library.COCOeval_faster(truth, truth.loadRes(self.detections), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        found = evaluation.stats_as_dict
        return {name: 100 * found[key] for name, key in AP_NAMES.items() if found[key] != -1}


def average_precision_library() -> Any:
    """faster-coco-eval.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("faster_coco_eval")
    except ModuleNotFoundError as error:
        raise ImportError(f"COCO's mask AP needs faster-coco-eval, which is not installed: {EXTRA}") from error
