"""SAM-COCO: masks for box prompts with the student in place of SAM's image encoder (paper, Section 3.1, Table 1).

The paper does not say how masks are prompted and scored. Its number for SAM-H (77.18) fits the metric of the
evaluation that it names, EfficientViT-SAM's: ground-truth boxes, mean mask IoU x 100 over all annotations, crowd
regions among them (`crowds`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from transformers_radio.disk import differences
from transformers_radio.teachers import digest_weights
from transformers_radio.teachers.base import DTYPES

from .coco import (
    PromptedImage,
    decode_segmentation,
    encode_mask,
    file_digests,
    load_annotations,
    load_detections,
    mask_library,
)
from .config import SamCocoConfig
from .metrics import MaskAveragePrecision, MeanMaskIoU, average_precision_library, mask_overlap
from .prompting import Encoder, SamEncoder, StudentEncoder, predict_masks


def evaluate_sam_coco(
    encoder: SamEncoder | StudentEncoder, sam: Any, config: SamCocoConfig, results: str | Path
) -> dict[str, float]:
    """Prompts for every object of a split and scores the masks; resumes a run that was stopped or killed.

    Args:
        encoder: `SamEncoder(sam)` for the reference, or `StudentEncoder(student, sam, config.adaptor,
            config.image_size, config.window_size)`; on SAM's device.
        sam: the whole SAM of `config.sam`, see `teachers.segment_anything.load_sam`.
        config: data and settings.
        results: a JSONL file with a line for each finished image. If it exists, its images are not done again; it
            must come from the same weights, data and settings.

    Returns:
        Without `config.detections`: mean_mask_iou (percent, over annotations), and the numbers of images, annotations,
        crowd regions left out (crowd) and empty masks left out (empty).
        With them: AP, AP50, AP75, AP_small, AP_medium, AP_large of COCO's masks (percent; a size without an
        annotated object is left out), and the numbers of images and detections.

    Raises:
        ImportError: a library for COCO's masks or its AP is not installed.
        FileNotFoundError: annotations, detections or images are missing.
        ValueError: files or settings that do not fit together; `results` of another run.
    """
    if config.prompts_per_chunk < 1:
        raise ValueError(f"prompts_per_chunk is {config.prompts_per_chunk}; expected at least 1.")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}.")
    mask_library()
    crowds = 0
    if config.detections is None:
        images, crowds = load_annotations(config)
    else:
        average_precision_library()
        images = load_detections(config)
    records, file = open_results(Path(results), _settings(encoder, sam, config, images))
    with file:
        waiting = [image for image in images if image.id not in records]
        for image in tqdm(waiting, desc="prompted masks", unit=" images", total=len(images), initial=len(records)):
            records[image.id] = _prompt_image(encoder, sam, config, image)
            file.write(json.dumps(records[image.id]).encode() + b"\n")
            file.flush()
    if config.detections is not None:
        return _average_precision(config, [records[image.id] for image in images])
    metric = MeanMaskIoU()
    for image in images:
        metric.empty += records[image.id]["empty"]
        for _, intersection, union in records[image.id]["annotations"]:
            metric.add_overlap(intersection, union)
    if not len(metric):
        raise ValueError(f"All {metric.empty} masks of {config.annotations} are empty, so there is none to score.")
    found = metric.compute()
    counts = {"images": len(images), "annotations": found["masks"], "crowd": crowds, "empty": found["empty"]}
    return {"mean_mask_iou": found["mean_mask_iou"], **counts}


@torch.no_grad()
def _prompt_image(
    encoder: SamEncoder | StudentEncoder, sam: Any, config: SamCocoConfig, image: PromptedImage
) -> dict[str, Any]:
    """One line of the results: id, intersection and union in pixels of each annotation; or COCO results with masks."""
    boxes, entries = image.boxes(), image.objects
    record: dict[str, Any] = {"image_id": image.id}
    truths: list[torch.Tensor] = []
    if config.detections is None:
        masks = [decode_segmentation(entry["segmentation"], image.size) for entry in entries]
        kept = [index for index, mask in enumerate(masks) if mask.any()]
        boxes, entries, truths = boxes[kept], [entries[i] for i in kept], [masks[i] for i in kept]
        record |= {"annotations": [], "empty": len(masks) - len(kept)}
    else:
        record |= {"detections": []}
    if not entries:
        return record
    pixels = image.read()[None].to(sam.device)
    with torch.autocast(sam.device.type, DTYPES[config.dtype], enabled=config.dtype != "float32"):
        embedding = encoder(pixels)  # (1, C, g, g)
    embedding = embedding.float()  # the decoder is float32
    for start in range(0, len(entries), config.prompts_per_chunk):
        chunk = slice(start, start + config.prompts_per_chunk)
        predictions, _ = predict_masks(sam, embedding, boxes[chunk], image.size, config.best_of_three)
        predictions = predictions.cpu()
        if config.detections is None:
            intersections, unions = mask_overlap(predictions, torch.stack(truths[chunk]))
            ids = [entry["id"] for entry in entries[chunk]]
            record["annotations"] += zip(ids, intersections.tolist(), unions.tolist(), strict=True)
        else:
            record["detections"] += [
                {key: entry[key] for key in ("image_id", "category_id", "score")} | {"segmentation": encode_mask(mask)}
                for entry, mask in zip(entries[chunk], predictions, strict=True)
            ]
    return record


@torch.no_grad()
def prompted_mask_iou(
    embed: Encoder,
    sam: Any,
    images: torch.Tensor,
    boxes: Sequence[torch.Tensor],
    instances: torch.Tensor,
    batch_size: int = 64,
) -> float:
    """Percent mean IoU over all objects of small images in memory, each prompted by its true box (single mask).

    Args:
        embed: such as `SamEncoder` or `StudentEncoder`.
        sam: the whole SAM that decodes.
        images: uint8 (N, 3, H, W).
        boxes: per image (K, 4), x0, y0, x1, y1 in pixels; its k-th object has the number k + 1 in `instances`.
        instances: integers (N, H, W), 0 for background. An object without a pixel is left out.
        batch_size: images that are encoded at once.

    Raises:
        ValueError: images, boxes and instances that do not fit together, or no object at all.
    """
    if not len(images) == len(boxes) == len(instances) or images.shape[2:] != instances.shape[1:]:
        raise ValueError(
            f"There are images {tuple(images.shape)}, boxes of {len(boxes)} images and instances "
            f"{tuple(instances.shape)}; expected (N, 3, H, W), N and (N, H, W)."
        )
    height, width = images.shape[2:]
    metric = MeanMaskIoU()
    for start in tqdm(range(0, len(images), batch_size), desc="prompted masks", unit="batch"):
        embeddings = embed(images[start : start + batch_size].to(sam.device))
        for embedding, box, instance in zip(
            embeddings, boxes[start : start + batch_size], instances[start : start + batch_size], strict=True
        ):
            if len(box) == 0:
                continue
            masks, _ = predict_masks(sam, embedding[None], box.cpu().numpy(), (height, width))
            numbers = torch.arange(1, len(box) + 1, device=sam.device)
            truths = instance.to(sam.device) == numbers[:, None, None]  # (K, H, W)
            intersection, union = mask_overlap(masks, truths)
            visible = truths.flatten(1).any(dim=1)
            for pair in zip(intersection[visible].tolist(), union[visible].tolist(), strict=True):
                metric.add_overlap(*pair)
    if not len(metric):
        raise ValueError("No image has an object with a visible pixel, so there is no mask to score.")
    return metric.compute()["mean_mask_iou"]


def _average_precision(config: SamCocoConfig, records: list[dict[str, Any]]) -> dict[str, float]:
    content = json.loads(Path(config.annotations).read_text(encoding="utf-8"))
    truths = {image["id"]: {**image, "annotations": []} for image in content["images"]}
    for entry in content["annotations"]:
        truths[entry["image_id"]]["annotations"].append(entry)
    detections = {record["image_id"]: record["detections"] for record in records}
    metric = MaskAveragePrecision()
    for number, truth in truths.items():
        metric.add(prediction=detections.get(number, []), reference=truth)
    return {**metric.compute(), "images": len(records), "detections": sum(map(len, detections.values()))}


def _settings(
    encoder: SamEncoder | StudentEncoder, sam: Any, config: SamCocoConfig, images: list[PromptedImage]
) -> dict[str, Any]:
    """All that the lines of a results file depend on."""
    return {
        "weights": digest_weights(encoder, sam.prompt_encoder, sam.mask_decoder),
        **file_digests(config, images),
        "image_size": encoder.image_size,
        "window_size": encoder.window_size,
        "best_of_three": config.best_of_three,
        "crowds": config.crowds,
        "dtype": config.dtype,
    }


def open_results(path: Path, settings: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], BinaryIO]:
    """The finished images of a results file by id, and the file, open for more lines; it is made if there is none.

    A kill can cut the last line short; that image is done again.

    Raises:
        ValueError: the file comes from another run, or is not a results file; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"settings": settings}).encode() + b"\n"
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and header.startswith(content):  # nothing, or a cut first line
        path.write_bytes(header)
        return {}, path.open("ab")
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = first["settings"]
        records = {line["image_id"]: line for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file of this evaluation, or it is damaged: name another one."
        ) from error
    changed = differences(found, settings, list(settings))
    if changed:
        raise ValueError(
            f"{path} comes from another run; it differs in {', '.join(changed)}: name another file, or delete it."
        )
    file = path.open("r+b")
    file.truncate(len(whole))
    file.seek(len(whole))
    return records, file
