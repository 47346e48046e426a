"""Which summary of a student finds images of the same class: its own, that of an adaptor, or all of them?

    transformers-radio quickstart
    python benchmarks/index_summaries.py runs/quickstart runs/quickstart/run/student

k-NN (k = 20, temperature 0.07) over the quickstart's 96 classes, as its table counts: a bank of 2880 training
images and all validation images as queries, at the student's preferred resolution. Prints a Markdown table.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from transformers_radio.evaluation import knn_accuracy
from transformers_radio.evaluation.models.encoder import load_student
from transformers_radio.quickstart.measure import BANK_IMAGES, resize_images
from transformers_radio.quickstart.teacher_data import Split, load_split


@torch.no_grad()
def summaries(student, split: Split) -> dict[str, torch.Tensor]:
    """Name -> (N, D)."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in resize_images(split.images, student.preferred_resolution).split(64):
        out = student(batch.float() / 255)
        found.setdefault("summary", []).append(out.summary)
        for name, adaptor in out.adaptors.items():
            if adaptor.summary is not None:
                found.setdefault(f'adaptors["{name}"].summary', []).append(adaptor.summary)
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    # each of length 1, so that all weigh the same
    return {
        **whole,
        "all of them, concatenated": torch.cat([F.normalize(part, dim=1) for part in whole.values()], dim=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the quickstart's folder")
    parser.add_argument("student", help="folder of a student of its scenes")
    args = parser.parse_args()
    student = load_student(args.student)
    world = args.quickstart / "world"
    train, validation = load_split(world, "train", BANK_IMAGES), load_split(world, "validation")
    bank, queries = summaries(student, train), summaries(student, validation)
    print(f"| {len(train.images)} images in the index | width | k-NN |\n|---|---:|---:|")
    for name in bank:
        accuracy = knn_accuracy(bank[name], train.classes, queries[name], validation.classes)
        title = name if " " in name else f"`{name}`"
        print(f"| {title} | {bank[name].shape[1]} | {accuracy:.2f} |")


if __name__ == "__main__":
    main()
