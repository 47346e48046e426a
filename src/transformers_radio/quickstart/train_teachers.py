"""Trains the three small teachers that ship with the package, and measures what each of them can do.

    python -m transformers_radio.quickstart.train_teachers --output DIR [--only clip] [--again]

A teacher that is already in DIR is kept. DIR/teachers.json holds what was trained and what was measured.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from transformers_radio.disk import write_json
from transformers_radio.evaluation.classification.knn import knn_accuracy
from transformers_radio.evaluation.classification.zero_shot import zero_shot_accuracy, zero_shot_classifier
from transformers_radio.evaluation.sam_coco.measure import prompted_mask_iou
from transformers_radio.evaluation.sam_coco.metrics import MeanMaskIoU
from transformers_radio.evaluation.sam_coco.prompting import SamEncoder
from transformers_radio.evaluation.segmentation.miou import MeanIoU
from transformers_radio.teachers import Teacher, build_teacher, load_text_encoder
from transformers_radio.teachers.segment_anything import load_sam

from .scenes import CLASS_NAMES, MATERIALS
from .teacher_data import Split, load_split
from .train_clip import TEMPLATES, train_clip
from .train_dinov2 import train_dinov2
from .train_sam import train_sam
from .world import make_world

TRAINERS: dict[str, Callable[..., dict[str, Any]]] = {"clip": train_clip, "dinov2": train_dinov2, "sam": train_sam}
PROBE_GRID = 8  # all teachers' features are probed on the same 8 x 8 cells
PROBE_SCENES = 4000  # training scenes that a probe sees


def load_teacher(directory: Path, name: str) -> Teacher:
    """One of the three, through the package's own teacher classes."""
    if name == "clip":
        return build_teacher("open_clip", str(directory / "clip"))
    if name == "dinov2":
        return build_teacher("transformers", str(directory / "dinov2"))
    return build_teacher("segment_anything", str(directory / "sam" / "sam.pth"))


@torch.no_grad()
def encode(teacher: Teacher, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries (N, C) (the mean of the features where a teacher has none) and features on the probe's grid.

    Args:
        images: (N, 3, 128, 128) uint8.

    Returns:
        (N, summary dim) and (N, feature dim, 8, 8), float32.
    """
    summaries, grids = [], []
    for chunk in tqdm(images.split(200), desc="encoding", unit="batch"):
        side = teacher.image_size
        pixels = F.interpolate(chunk.float() / 255, size=(side, side), mode="bilinear", antialias=True)
        output = teacher(pixels.clamp(0, 1))
        # (B, h * w, C) -> (B, C, h, w) -> (B, C, 8, 8)
        grid = output.features.transpose(1, 2).unflatten(2, output.grid)
        grids.append(F.interpolate(grid, size=(PROBE_GRID, PROBE_GRID), mode="bilinear"))
        summaries.append(output.features.mean(dim=1) if output.summary is None else output.summary)
    return torch.cat(summaries), torch.cat(grids)


def cell_labels(semantic: torch.Tensor, part: str) -> torch.Tensor:
    """The most frequent label in each cell of the probe's grid.

    Args:
        semantic: (N, 128, 128) uint8.
        part: "shapes" (0 background, 1 to 12) or "materials" (0 background, 1 to 8).

    Returns:
        (N, 8, 8) int64.
    """
    thing = semantic.long() - 1
    number = torch.div(thing, len(MATERIALS), rounding_mode="floor") if part == "shapes" else thing % len(MATERIALS)
    labels = torch.where(thing >= 0, number + 1, 0)
    cell = semantic.shape[-1] // PROBE_GRID
    # (N, 128, 128) -> (N, 8, cell, 8, cell) -> (N, 8, 8, cell * cell)
    cells = labels.unflatten(2, (PROBE_GRID, cell)).unflatten(1, (PROBE_GRID, cell)).transpose(2, 3).flatten(3)
    return cells.mode(dim=-1).values


def linear_probe_miou(
    bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor
) -> float:
    """Percent mean IoU over the classes of a linear classifier of single cells (standardized, AdamW, 600 steps).

    Args:
        bank, queries: (N, C, 8, 8) and (M, C, 8, 8) features.
        bank_labels, labels: (N, 8, 8) and (M, 8, 8).
    """
    torch.manual_seed(0)
    classes = int(bank_labels.max()) + 1
    cells, truth = bank.movedim(1, -1).flatten(0, 2), bank_labels.flatten()  # (N * 64, C), (N * 64,)
    mean, std = cells.mean(dim=0), cells.std(dim=0) + 1e-6
    probe = nn.Linear(cells.shape[1], classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        chosen = torch.randint(len(cells), (4096,))
        loss = F.cross_entropy(probe((cells[chosen] - mean) / std), truth[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guess = probe((queries.movedim(1, -1).flatten(0, 2) - mean) / std).argmax(dim=1)
    metric = MeanIoU(classes)
    metric.add(prediction=guess, reference=labels.flatten())
    return metric.compute()["mIoU"]


def box_prompt_iou(checkpoint: Path, data: Split) -> dict[str, float]:
    """Percent mean IoU over every object, prompted by its true box; and that of the trivial answer, the filled box."""
    sam = load_sam(str(checkpoint))
    filled = MeanMaskIoU()
    for boxes, instance in zip(data.boxes, data.instances, strict=True):
        for number, (x0, y0, x1, y1) in enumerate(boxes.tolist(), start=1):
            rectangle = torch.zeros_like(instance, dtype=torch.bool)
            rectangle[y0:y1, x0:x1] = True
            filled.add(prediction=rectangle, reference=instance == number)
    return {
        "box_prompt_iou": prompted_mask_iou(SamEncoder(sam), sam, data.images, data.boxes, data.instances),
        "filled_box_iou": filled.compute()["mean_mask_iou"],
    }


def measure(directory: Path, name: str, train: Split, validation: Split) -> dict[str, float]:
    """What one teacher can do on the validation split, in percent, and its size."""
    teacher = load_teacher(directory, name)
    summaries, grids = encode(teacher, validation.images)
    bank_summaries, bank_grids = encode(teacher, train.images)
    figures = {
        "vision_parameters": float(sum(p.numel() for p in teacher.parameters())),
        "knn": knn_accuracy(bank_summaries, train.classes, summaries, validation.classes),
    }
    for part in ("shapes", "materials"):
        figures[f"probe_{part}_miou"] = linear_probe_miou(
            bank_grids[:PROBE_SCENES],
            cell_labels(train.semantic[:PROBE_SCENES], part),
            grids,
            cell_labels(validation.semantic, part),
        )
    if name == "clip":
        classifier = zero_shot_classifier(
            load_text_encoder("open_clip", str(directory / "clip")), CLASS_NAMES, TEMPLATES
        )
        figures["zero_shot"] = zero_shot_accuracy(summaries, classifier, validation.classes)
    if name == "sam":
        figures |= box_prompt_iou(directory / "sam" / "sam.pth", validation)
    return {key: round(value, 2) for key, value in figures.items()}


def read_report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for clip/, dinov2/, sam/ and the scenes")
    parser.add_argument("--only", choices=list(TRAINERS), help="train only this one")
    parser.add_argument("--again", action="store_true", help="train teachers again that are there")
    parser.add_argument("--steps", type=int, help="number of steps; default: each trainer's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    directory = options.output
    world = make_world(directory / "world")
    train, validation = (load_split(world.directory, split) for split in ("train", "validation"))
    report_path = directory / "teachers.json"
    for name, trainer in TRAINERS.items():
        if options.only not in (None, name) or (name in read_report(report_path) and not options.again):
            continue
        chosen = {} if options.steps is None else {"steps": options.steps}
        done = trainer(directory / name, train, seed=options.seed, **chosen)
        figures = {"seed": options.seed, **done, **measure(directory, name, train, validation)}
        report = {**read_report(report_path), name: figures}  # read again: the others may train at the same time
        write_json(report_path, report)
        print(name, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
