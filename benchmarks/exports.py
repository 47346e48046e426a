"""Accuracy of exported students on the quickstart's world: k-NN and zero-shot, for each format and precision.

    make quickstart
    python benchmarks/exports.py runs/quickstart

Prints a Markdown table. The programs are written to FOLDER/exports. `--run run-vit` measures the student of
`transformers-radio quickstart student=vit`.
"""

import argparse
from pathlib import Path

import torch

import transformers_radio.quickstart
from transformers_radio.evaluation.classification.knn import knn_accuracy
from transformers_radio.evaluation.classification.zero_shot import zero_shot_accuracy, zero_shot_classifier
from transformers_radio.export.parity import load_program
from transformers_radio.export.program import Program, open_student
from transformers_radio.export.run import export_student
from transformers_radio.quickstart.measure import BANK_IMAGES, TEMPLATES, resize_images
from transformers_radio.quickstart.scenes import CLASS_NAMES
from transformers_radio.quickstart.teacher_data import load_split
from transformers_radio.teachers import load_text_encoder

VARIANTS = [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "q8"), ("torch-export", "q8")]


def size_of(path: Path) -> float:
    """Megabytes of a file or folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


@torch.no_grad()
def encode(program, images: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """`summary` and `clip_summary` of uint8 images, at `side` pixels."""
    batches = [program(batch.float() / 255) for batch in resize_images(images, side).split(64)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("summary", "clip_summary")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the quickstart")
    parser.add_argument("--run", default="run", help="the run in it whose student is measured")
    options = parser.parse_args()
    folder, student = options.folder, str(options.folder / options.run / "student")
    train = load_split(folder / "world", "train", BANK_IMAGES)
    validation = load_split(folder / "world", "validation")
    clip = Path(transformers_radio.quickstart.__file__).parent / "teachers" / "clip"
    classifier = zero_shot_classifier(load_text_encoder("open_clip", str(clip)), CLASS_NAMES, TEMPLATES)
    eager = open_student(student, None, None)
    programs = {"the student itself, fp32": (Program(eager), size_of(Path(student)), 0.0)}
    for format, dtype in VARIANTS:
        path, rows = export_student(student, folder / "exports", format, dtype, overwrite=True)
        worst = max(row.error for row in rows)
        programs[f"{format}, {dtype}"] = (load_program(path, format), size_of(path), worst)
    print("| program | MB | relative error | k-NN | zero-shot |\n|---|---|---|---|---|")
    for name, (program, megabytes, worst) in programs.items():
        bank, queries = (encode(program, split.images, eager.preferred_resolution) for split in (train, validation))
        knn = knn_accuracy(bank["summary"], train.classes, queries["summary"], validation.classes)
        words = zero_shot_accuracy(queries["clip_summary"], classifier, validation.classes)
        print(f"| {name} | {megabytes:.1f} | {worst:.1e} | {knn:.2f} | {words:.2f} |", flush=True)


if __name__ == "__main__":
    main()
