"""`eval zero-shot`: the class whose name a text tower finds most similar to an image (paper, Section 3.1, Table 1)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from transformers_radio.disk import digest, replace_whole
from transformers_radio.evaluation.images.labeled import COUNTED
from transformers_radio.evaluation.images.summaries import SummaryStore
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import clear_work
from transformers_radio.teachers import digest_weights

from .config import ZeroShotConfig
from .store import load_encoders, open_split, resolution, store_config, store_split
from .words import load_class_names, load_templates, warn_of_other_classes
from .zero_shot import Template, ZeroShotAccuracy, check_classifier, zero_shot_classifier

ROWS = 8192  # summaries that are compared at once


@dataclass
class Classifier:
    """weights: (C, D), one unit vector per class. digest: a hash of the text tower and of all prompts."""

    weights: torch.Tensor
    digest: str


class ZeroShot(Task):
    """Zero-shot accuracy in percent. Summaries and classifiers are kept in the output, and encoded once.

    A teacher's text tower is in memory until the classifier is made, before the first image. No image tower is, but
    that of the model that is evaluated.

    Raises:
        FileNotFoundError, ValueError: data, settings, class names or a model that cannot be used; before the first
            image.
        ValueError: labels that are not classes, nothing readable.
        OSError: too little room on the disk.
    """

    name = "zero-shot"
    config_class = ZeroShotConfig
    config: ZeroShotConfig
    counted = (
        *ENCODER_COUNTED,
        *("output", "classifier", "image_size", "store_dtype"),
        *(f"images.{name}" for name in COUNTED),
    )
    several_processes = True
    passed_over = ("train_split",)  # k-NN's, in recipes/evaluation/imagenet1k.yaml
    columns = ("Zero-shot",)
    hub_task = ("zero-shot-image-classification", "Zero-shot classification")

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        self.split = open_split(config, config.split)
        self.names = load_class_names(config.classes, self.split.class_names, config.data)
        self.templates = load_templates(config.templates)
        self.split.num_classes = len(self.names)
        encoders = load_encoders(models, config, config.adaptor)
        towers = [config.text or encoder.text_tower() for encoder in encoders]
        self.classifiers: dict[str, Classifier] = {}
        jobs = []
        for encoder, tower in zip(encoders, towers, strict=True):
            if tower not in self.classifiers:
                self.classifiers[tower] = self._make_classifier(tower)
            classifier = self.classifiers[tower]
            blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=PartialState().device)
            check_classifier(classifier.weights, encoder.language(blank).shape[1])
            side = resolution(store_config(encoder, config))
            settings = {
                **encoder.settings(),
                "output": "language",
                "text": tower,
                "classifier": classifier.digest,
                "image_size": side,
                "store_dtype": config.store_dtype,
                "images": self.split.fingerprint(),
            }
            jobs.append(Job.of(encoder, config.title, settings, side))
        return jobs

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "images": self.split.recognized(settings.get("images"))}

    def measure(self, job: Job, folder: Path) -> Measured:
        config, tower = self.config, job.settings["text"]
        clear_work(folder, config.overwrite)
        summaries = store_split(job, self.split, folder, config)
        with_images, num_classes = len(summaries.labels.unique()), len(self.names)
        if config.classes is not None:
            warn_of_other_classes(config.title, config.classes, config.data, with_images)
        protocol = store_config(job.encoder, config).protocol
        return Measured(
            {"Zero-shot": self._accuracy(summaries, self.classifiers[tower].weights)},
            f"{num_classes} classes, {len(self.templates)} templates, text tower {tower}; {protocol}",
            {
                "images": len(summaries),
                "classes": num_classes,
                "classes_without_images": num_classes - with_images,
                "skipped": sum(summaries.skipped.values()),
            },
        )

    def _accuracy(self, summaries: SummaryStore, weights: torch.Tensor) -> float:
        """Percent, on every process: compared with encoding the images this takes no time."""
        if summaries.labels.max() >= len(weights):
            raise ValueError(
                f"A label of {self.split.source} ({self.split.split}) is {summaries.labels.max()}, but there are "
                f"{len(weights)} class names: give one name per class."
            )
        metric = ZeroShotAccuracy(weights.to(PartialState().device))
        for vectors, labels in summaries.chunks(ROWS):
            metric.add_batch(predictions=vectors.to(metric.classifier.device), references=labels)
        return metric.compute()["zero_shot_accuracy"]

    def _make_classifier(self, tower: str) -> Classifier:
        """Made by the main process, or read if the same tower has already encoded the same prompts."""
        state = PartialState()
        made: list[Classifier | None] = [None]
        if state.is_main_process:
            encode_text = load_text_tower(tower)
            prompts = [json.dumps(_prompts(template, self.names)) for template in self.templates]
            name = digest([digest_weights(encode_text), *prompts])
            path = self.output / "classifiers" / f"{name}.safetensors"
            if not path.exists():
                weights = zero_shot_classifier(encode_text.to(state.device), self.names, self.templates).cpu()
                with replace_whole(path, unique=True) as temporary:
                    save_file({"classifier": weights}, temporary)
            made = [Classifier(load_file(path)["classifier"], name)]
        broadcast_object_list(made)
        assert made[0] is not None
        return made[0]


def _prompts(template: Template, names: Sequence[str]) -> list[str]:
    return [template.format(name) if isinstance(template, str) else template(name) for name in names]
