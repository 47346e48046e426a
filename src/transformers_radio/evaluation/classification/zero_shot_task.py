"""`eval zero-shot`: the class whose name a text tower finds most similar to an image (paper, Section 3.1, Table 1)."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from transformers_radio.evaluation.images.labelled import COUNTED, LabelledSplit
from transformers_radio.evaluation.images.summaries import SummaryStore, store_summaries
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.processes import process_state
from transformers_radio.evaluation.result import Result, done, result_path, work_folder
from transformers_radio.teachers import digest_weights

from .metrics import ZeroShotAccuracy
from .settings import (
    ClassificationConfig,
    clear_work,
    load_encoders,
    open_split,
    resolution,
    store_config,
)
from .words import load_class_names, load_templates, warn_of_other_classes
from .zero_shot import Template, check_classifier, zero_shot_classifier

ROWS = 8192  # summaries that are compared at once
# What a result is known by, of its settings.
RESULT_COUNTED = (
    *ENCODER_COUNTED,
    *("output", "classifier", "image_size", "store_dtype"),
    *(f"images.{name}" for name in COUNTED),
)


@dataclass
class ZeroShotConfig(ClassificationConfig):
    """Settings of the task; the defaults are the paper's."""

    text: str | None = None  # text tower, as open_clip:... or transformers:...; null: the adaptor's teacher's
    adaptor: str | None = None  # the student's that is read; null: the one to a teacher with a text tower


@dataclass
class Classifier:
    """weights: (C, D), a unit vector a class. digest: of the text tower and of all prompts."""

    weights: torch.Tensor
    digest: str


def run(models: list[str], config: ZeroShotConfig, output: Path) -> list[Result]:
    """One `Result` a model: accuracy in percent. Summaries and classifiers are kept in the output, and encoded once.

    Of a teacher, its text tower is in memory until the classifier is made, before the first image, and of an image
    tower nothing but the model that is evaluated. Alone or on every process of `accelerate launch`.

    Raises:
        FileNotFoundError, ValueError: data, settings, words or a model that cannot be used; before the first image.
        ValueError: labels that are no classes, nothing readable.
        OSError: too little room on the disk.
    """
    state = process_state()
    split = open_split(config, config.split)
    names = load_class_names(config.classes, split.class_names, config.data)
    templates = load_templates(config.templates)
    split.num_classes = len(names)
    encoders = load_encoders(models, config, config.adaptor)
    towers = [config.text or encoder.text_tower() for encoder in encoders]
    for encoder in encoders:
        store_config(encoder, config).check()
    made: dict[str, Classifier] = {}
    for encoder, tower in zip(encoders, towers, strict=True):
        if tower not in made:
            made[tower] = _make_classifier(tower, names, templates, output / "classifiers")
        side = encoder.image_size
        dim = encoder.language(torch.zeros(1, 3, side, side, device=state.device)).shape[1]
        check_classifier(made[tower].weights, dim)
    return [
        _measure(encoder, tower, made[tower], len(templates), split, config, output)
        for encoder, tower in zip(encoders, towers, strict=True)
    ]


def _measure(
    encoder: VisionEncoder,
    tower: str,
    classifier: Classifier,
    num_templates: int,
    split: LabelledSplit,
    config: ZeroShotConfig,
    output: Path,
) -> Result:
    path = result_path(output, encoder.name, "zero-shot", config.title)
    folder = work_folder(path)
    stored = store_config(encoder, config)
    of_model = {**encoder.settings(), "output": "language"}
    settings = {
        **of_model,
        "text": tower,
        "classifier": classifier.digest,
        "image_size": resolution(stored),
        "store_dtype": config.store_dtype,
        "images": split.fingerprint(),
    }

    def before(there: dict[str, Any]) -> dict[str, Any]:
        return {**there, "images": split.recognized(there.get("images"))}

    finished = done(path, settings, RESULT_COUNTED, config.overwrite, before)
    if finished is not None:
        return finished
    clear_work(folder, config.overwrite)
    store = store_summaries(folder, encoder.language, of_model, split, stored, f"{encoder.name} {split.split}")
    num_classes = len(classifier.weights)
    if config.classes is not None:
        warn_of_other_classes(config.title, config.classes, config.data, len(store.labels.unique()))
    result = Result(
        "zero-shot",
        encoder.name,
        config.title,
        {"Zero-shot": _accuracy(store, classifier.weights, split)},
        f"{num_classes} classes, {num_templates} templates, text tower {tower}; {stored.protocol}",
        settings,
        {
            "images": len(store),
            "classes": num_classes,
            "classes_without_images": num_classes - len(store.labels.unique()),
            "skipped": sum(store.skipped.values()),
        },
        encoder.params,
        resolution(stored),
    )
    if PartialState().is_main_process:
        result.write(path)
    return result


def _accuracy(store: SummaryStore, weights: torch.Tensor, split: LabelledSplit) -> float:
    """Percent, on every process: next to encoding the images this takes no time."""
    if store.labels.max() >= len(weights):
        raise ValueError(
            f"A label of {split.source} ({split.split}) is {store.labels.max()}, but there are {len(weights)} class "
            "names: give one name a class."
        )

    metric = ZeroShotAccuracy(weights.to(PartialState().device))
    for summaries, labels in store.chunks(ROWS):
        metric.add_batch(predictions=summaries.to(metric.classifier.device), references=labels)
    return metric.compute()["zero_shot_accuracy"]


def _make_classifier(tower: str, names: list[str], templates: Sequence[Template], folder: Path) -> Classifier:
    """Made by the main process, or read where the same tower has already encoded the same prompts."""
    state = PartialState()
    made: list[Classifier | None] = [None]
    if state.is_main_process:
        encode_text = load_text_tower(tower)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(digest_weights(encode_text).encode())
        for template in templates:
            prompts = [template.format(name) if isinstance(template, str) else template(name) for name in names]
            digest.update(json.dumps(prompts).encode())
        path = folder / f"{digest.hexdigest()}.safetensors"
        if not path.exists():
            weights = zero_shot_classifier(encode_text.to(state.device), names, templates).cpu()
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"classifier": weights}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        made = [Classifier(load_file(path)["classifier"], digest.hexdigest())]
    broadcast_object_list(made)
    assert made[0] is not None
    return made[0]
