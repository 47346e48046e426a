"""COCO-format annotations and detections as box prompts with masks, one list entry per image."""

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb
from transformers_radio.disk import digest

from .config import SamCocoConfig

EXTRA = 'pip install "transformers_radio[eval]"'


@dataclass
class PromptedImage:
    """An image and the objects to prompt for."""

    id: int
    path: Path
    size: tuple[int, int]  # (H, W) as the annotation file states it
    objects: list[dict[str, Any]]  # annotations (with a segmentation) or detections (with a score)

    def read(self) -> torch.Tensor:
        """uint8 RGB (3, H, W).

        Raises:
            ValueError: the file cannot be decoded, or is of another size than the annotations are made for.
        """
        try:
            image = read_rgb(self.path)
        except SkippedImage as error:
            raise ValueError(
                f"{self.path} cannot be decoded ({error.reason}): restore the file and run the same command again."
            ) from error
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{self.path} is {image.height}x{image.width} pixels, but its annotations are made for "
                f"{self.size[0]}x{self.size[1]}: the masks would not fit. Use the dataset's original images."
            )
        return pil_to_tensor(image).contiguous()  # (3, H, W)

    def boxes(self) -> np.ndarray:
        """The objects' boxes as float64 (N, 4): x0, y0, x1, y1 in pixels. COCO has x, y, width, height."""
        boxes = np.array([entry["bbox"] for entry in self.objects], dtype=np.float64).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def load_annotations(config: SamCocoConfig) -> tuple[list[PromptedImage], int]:
    """All images with annotated objects, in the order of their ids, and the number of crowd regions left out (none
    with `config.crowds`).

    Raises:
        FileNotFoundError: the annotations or an image file are missing.
        ValueError: the file is not a COCO annotation file of instances, or an annotation has no image in it.
    """
    images, entries, _ = _read_annotations(config)
    kept = [entry for entry in entries if config.crowds or not entry.get("iscrowd", 0)]
    crowds = len(entries) - len(kept)
    if not kept:
        raise ValueError(f"{config.annotations} has no object to prompt for ({crowds} crowd regions are left out).")
    return _group(config, images, kept, "Annotation"), crowds


def load_detections(config: SamCocoConfig) -> list[PromptedImage]:
    """All images with detections, in the order of their ids.

    Raises:
        FileNotFoundError: the detections, the annotations or an image file are missing.
        ValueError: the file is not a COCO results file of boxes, or a detection's image or category is not in the
            annotations.
    """
    assert config.detections is not None
    images, annotations, categories = _read_annotations(config)
    for entry in annotations:
        if entry["image_id"] not in images:
            raise ValueError(
                f"Annotation {entry['id']} belongs to image {entry['image_id']}, which is not in {config.annotations}."
            )
    detections = _read_json(config.detections)
    if not isinstance(detections, list) or not detections or not all(isinstance(entry, dict) for entry in detections):
        raise ValueError(f"{config.detections} holds no detections: expected a non-empty list of COCO results.")
    for index, entry in enumerate(detections):
        missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
        if missing:
            raise ValueError(f"Detection {index} of {config.detections} lacks {', '.join(missing)}.")
        if entry["category_id"] not in categories:
            raise ValueError(
                f"Detection {index} of {config.detections} has the category {entry['category_id']}, which is not in "
                f"{config.annotations}: write COCO's category ids, not the detector's own numbers."
            )
    return _group(config, images, detections, "Detection")


def file_digests(config: SamCocoConfig, images: list[PromptedImage]) -> dict[str, str | None]:
    """Hashes of what the masks depend on: the annotations, the detections; names, sizes and dates of the images."""
    dated = ((image.path.name, image.path.stat()) for image in images)
    return {
        "annotations_digest": digest([Path(config.annotations).read_bytes()]),
        "detections_digest": None if config.detections is None else digest([Path(config.detections).read_bytes()]),
        "images_digest": digest(repr((name, status.st_size, status.st_mtime_ns)) for name, status in dated),
    }


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _read_annotations(config: SamCocoConfig) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], set[int]]:
    """Image entries by id, all annotations, and the ids of the categories."""
    content = _read_json(config.annotations)
    parts = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "area"),
        "categories": ("id",),
    }
    for part, keys in parts.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{config.annotations} is not a COCO annotation file: it has no list of {part}.")
        for entry in content[part]:
            missing = [key for key in keys if key not in entry]
            if missing:
                raise ValueError(
                    f"{config.annotations} is not a file of COCO's instance annotations: entry {entry.get('id')} of "
                    f"its {part} lacks {', '.join(missing)}."
                )
    images = {entry["id"]: entry for entry in content["images"]}
    return images, content["annotations"], {entry["id"] for entry in content["categories"]}


def _group(
    config: SamCocoConfig, images: dict[int, dict[str, Any]], entries: list[dict[str, Any]], kind: str
) -> list[PromptedImage]:
    """One PromptedImage for each image that an entry names; checks every box and that every image file is there."""
    grouped: dict[int, PromptedImage] = {}
    for index, entry in enumerate(entries):
        number, image_id, box = entry.get("id", index), entry.get("image_id"), entry.get("bbox")
        if image_id not in images:
            raise ValueError(
                f"{kind} {number} belongs to image {image_id}, which is not in {config.annotations}: the files are "
                "not of one split, or the image entry was lost."
            )
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise ValueError(f"{kind} {number} has the bbox {box!r}; expected [x, y, width, height] in pixels.")
        if image_id not in grouped:
            image = images[image_id]
            path = Path(config.images) / image["file_name"]
            grouped[image_id] = PromptedImage(image_id, path, (image["height"], image["width"]), [])
        grouped[image_id].objects.append(entry)
    missing = [image.path for image in grouped.values() if not image.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(grouped)} image files are missing, the first is {missing[0]}: set data and "
            "split, which name the folder that the file names of the annotations are in."
        )
    return [grouped[image_id] for image_id in sorted(grouped)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mask_library() -> Any:
    """The `mask` module of faster-coco-eval, or else of pycocotools: the same functions.

    Raises:
        ImportError: neither is installed.
    """
    for name in ("faster_coco_eval.core.mask", "pycocotools.mask"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"COCO's masks need faster-coco-eval (or pycocotools), which is not installed: {EXTRA}")


def decode_segmentation(segmentation: list[Any] | dict[str, Any], size: tuple[int, int]) -> torch.Tensor:
    """Polygons, uncompressed RLE or compressed RLE -> bool (H, W), by COCO's own functions.

    Raises:
        ImportError: no mask library is installed.
        ValueError: an RLE of another size.
    """
    mask = mask_library()
    height, width = size
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != (height, width):
            raise ValueError(f"An RLE mask is {segmentation['size']}, but its image is [{height}, {width}].")
        compressed = not isinstance(segmentation["counts"], list)
        rle = segmentation if compressed else mask.frPyObjects(segmentation, height, width)
    elif segmentation:
        rle = mask.merge(mask.frPyObjects(segmentation, height, width))  # the union of an object's polygons
    else:
        return torch.zeros(height, width, dtype=torch.bool)
    return torch.from_numpy(np.ascontiguousarray(mask.decode(rle))).bool()


def encode_mask(mask: torch.Tensor) -> dict[str, Any]:
    """Bool (H, W) -> compressed RLE that JSON can hold."""
    rle = mask_library().encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))
    counts = rle["counts"]
    return {"size": list(mask.shape), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
