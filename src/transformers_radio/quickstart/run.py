"""`transformers-radio quickstart`: made images, distillation, evaluation beside the teachers, a table, a picture."""

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

from transformers_radio.evaluation.features import extract_summaries, load_labelled_images
from transformers_radio.evaluation.knn import knn_accuracy
from transformers_radio.evaluation.report import Row, Table
from transformers_radio.evaluation.throughput import throughput, throughput_conditions
from transformers_radio.evaluation.visualize import teacher_student_figure
from transformers_radio.evaluation.zero_shot import zero_shot_accuracy, zero_shot_classifier
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import build_teacher
from transformers_radio.teachers.open_clip import load_text_encoder
from transformers_radio.training import Recipe, load_recipe, train

from .scenes import CLASS_NAMES
from .world import make_world

RECIPE = Path(str(resources.files("transformers_radio.quickstart") / "recipe.yaml"))
TITLES = {"clip": "CLIP", "dinov2": "DINOv2", "sam": "SAM"}
TEMPLATES = ["a {}", "a photo of a {}", "a picture of a {}"]
BANK_IMAGES = 4000  # of the training split: enough for k = 20 in 96 classes, and half a minute less than all
PICTURED = 6


@dataclass
class Encoder:
    """One row of the table: a network at its own resolution, and its summary and language-aligned summary, if any."""

    title: str
    network: nn.Module
    image_size: int
    params: int
    adaptor: str | None = None  # the student's adaptor that speaks CLIP's space

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """float (B, 3, image_size, image_size) in [0, 1] -> what k-NN compares (B, D)."""
        if self.adaptor is not None:
            return self.network(images, adaptors=[]).summary
        output = self.network(images)
        # SAM has no summary: the mean of its features stands in, so that its row is not empty.
        return output.features.mean(dim=1) if output.summary is None else output.summary

    def language(self, images: torch.Tensor) -> torch.Tensor:
        """float (B, 3, image_size, image_size) -> (B, D) in CLIP's space."""
        if self.adaptor is not None:
            return self.network(images, adaptors=[self.adaptor]).adaptors[self.adaptor].summary
        return self.network(images).summary

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """float (B, 3, image_size, image_size) -> (B, h*w, D) and the grid (h, w)."""
        if self.adaptor is not None:
            features = self.network(images, adaptors=[]).features
            side = round(features.shape[1] ** 0.5)
            return features, (side, side)
        output = self.network(images)
        return output.features, output.grid


def run_quickstart(output: Path, overrides: list[str] | None = None) -> Table | None:
    """Does what is not done yet in `output` and returns the table; None when a signal stopped the training.

    Writes output/world (made images) and output/run: the recipe, checkpoints and metrics, student/ (the model that
    AutoModel loads), table.md, table.json and features.png. `overrides` may name another `output_dir` than output/run.
    """
    world = make_world(output / "world")
    recipe = load_recipe(RECIPE, [f"output_dir={output / 'run'}", f"data.path={world.directory}", *(overrides or [])])
    result = train(recipe)
    if result.student_dir is None:
        return None
    run_dir = Path(recipe.output_dir)
    table_path, picture_path = run_dir / "table.json", run_dir / "features.png"
    student_written = (result.student_dir / "config.json").stat().st_mtime
    if table_path.exists() and table_path.stat().st_mtime > student_written:
        table = Table.from_json(table_path.read_text(encoding="utf-8"))
    else:
        encoders = load_encoders(recipe, result.student_dir)
        table = evaluate(encoders, world.directory, recipe.teachers["clip"].checkpoint)
        picture(encoders, world.directory, picture_path)
        (run_dir / "table.md").write_text(table.to_markdown(), encoding="utf-8")
        temporary = table_path.with_suffix(".tmp")  # written last and whole: it says that the evaluation is done
        temporary.write_text(table.to_json(), encoding="utf-8")
        os.replace(temporary, table_path)
    console = Console()
    console.print(table.to_rich())
    console.print(f"student: {result.student_dir}\npicture: {picture_path}", highlight=False, soft_wrap=True)
    return table


def load_encoders(recipe: Recipe, student_dir: Path) -> list[Encoder]:
    """The rows of the table: the recipe's teachers, then the student; all in float32, whatever they taught in."""
    encoders = []
    for name, spec in recipe.teachers.items():
        teacher = build_teacher(spec.type, spec.checkpoint, spec.image_size, **spec.options)
        encoders.append(Encoder(TITLES.get(name, name), teacher, teacher.image_size, _count(teacher)))
    student = RadioModel.from_pretrained(student_dir).eval()
    resolution = list(recipe.stages.values())[-1].resolution
    params = _count(student) - _count(student.adaptors)  # what replaces the teachers' encoders; the heads are theirs
    encoders.append(Encoder("RADIO student", student, resolution, params, adaptor="clip"))
    return encoders


def evaluate(encoders: list[Encoder], world: Path, clip_checkpoint: str) -> Table:
    """k-NN for every encoder, zero-shot for those in CLIP's space, throughput interleaved in one run."""
    train_split = load_labelled_images(world, "train", 128, limit=BANK_IMAGES)
    validation = load_labelled_images(world, "validation", 128)
    classifier = zero_shot_classifier(load_text_encoder(clip_checkpoint), CLASS_NAMES, TEMPLATES)
    inputs = {encoder.title: torch.rand(32, 3, encoder.image_size, encoder.image_size) for encoder in encoders}
    speed = throughput({encoder.title: encoder.network for encoder in encoders}, inputs, repeats=8)
    rows = []
    for encoder in encoders:
        bank, queries = (resize_images(split.images, encoder.image_size) for split in (train_split, validation))
        metrics: dict[str, float | None] = {"Zero-shot": None, "k-NN": None}
        if encoder.title in ("CLIP", "RADIO student"):
            language = extract_summaries(encoder.language, queries, description=f"{encoder.title} zero-shot")
            metrics["Zero-shot"] = zero_shot_accuracy(language, classifier, validation.labels)
        metrics["k-NN"] = knn_accuracy(
            extract_summaries(encoder, bank, description=f"{encoder.title} bank"),
            train_split.labels,
            extract_summaries(encoder, queries, description=f"{encoder.title} queries"),
            validation.labels,
        )
        rows.append(Row(encoder.title, encoder.params, encoder.image_size, speed[encoder.title], metrics))
    return Table(
        "Quickstart: a student and its three teachers",
        rows,
        notes=[
            f"{len(validation.labels)} validation images of {len(CLASS_NAMES)} classes; k-NN: k = 20, temperature "
            f"0.07, bank of {len(train_split.labels)} training images; zero-shot: {len(TEMPLATES)} templates.",
            f"Throughput in images/s, {throughput_conditions(encoders[-1].network, inputs[encoders[-1].title])}; "
            "each teacher at its own resolution.",
        ],
    )


def picture(encoders: list[Encoder], world: Path, path: Path) -> None:
    """Input, PCA of each teacher's features, PCA of the student's, for a few validation images."""
    images = load_labelled_images(world, "validation", 128, limit=PICTURED).images
    columns = {}
    with torch.no_grad():
        for encoder in encoders:
            columns[encoder.title] = encoder.features(resize_images(images, encoder.image_size).float() / 255)
    teacher_student_figure(images, columns, path)


def resize_images(images: torch.Tensor, side: int) -> torch.Tensor:
    return resize(images, [side, side], InterpolationMode.BICUBIC, antialias=True)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
