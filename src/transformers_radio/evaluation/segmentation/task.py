"""`eval segmentation`: a linear probe, or class names without training, on ADE20K, PASCAL VOC or your own set."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from transformers_radio.evaluation.classification.zero_shot import openai_imagenet_templates, zero_shot_classifier
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.paths import fingerprint_checkpoint
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import clear_work

from .config import METHODS, SegmentationConfig, SegmentationTaskConfig
from .data import SegmentationSplit, data_settings
from .inference import Encoder
from .probe import segmentation_probe
from .words import PatchProjection, dense_zero_shot, projected_patches, summary_head_patches

# Numbers of the probe that a result is known by: how an image is segmented, and how the head was trained.
INFERENCE = tuple(
    f"probe.{name}"
    for name in (
        *("long_side", "short_side", "crop_size", "test_mode", "stride", "whole_fit", "size_divisor"),
        "mixed_precision",
    )
)
TRAINING = tuple(
    f"probe.{name}"
    for name in (
        *("iterations", "batch_size", "learning_rate", "beta1", "beta2", "weight_decay", "warmup_iterations"),
        *("warmup_ratio", "power", "scale_min", "scale_max", "max_class_share", "flip_probability"),
        *("photometric_distortion", "seed"),
    )
)


class Segmentation(Task):
    """mIoU, mAcc and aAcc in percent; IoU per class is in the work folder's result.json.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before any training.
    """

    name = "segmentation"
    config_class = SegmentationTaskConfig
    config: SegmentationTaskConfig
    counted = (
        *ENCODER_COUNTED,
        *("method", "classes", "reduce_labels", "ignore_index", "validation files"),
        *INFERENCE,
    )
    several_processes = True
    columns = ("mIoU",)
    column_is_data = True
    hub_task = ("image-segmentation", "Semantic segmentation")
    hub_metrics = {"mIoU": "mean_iou", "mAcc": "mean_accuracy"}

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        config.probe.check()
        if config.method not in METHODS:
            raise ValueError(f"method is {config.method!r}; expected one of {', '.join(METHODS)}.")
        trains = config.method == "probe"
        self.counted = (*(("train files", *TRAINING) if trains else ("text",)), *self.counted)
        self.method = "" if trains else config.method
        self.splits = [
            SegmentationSplit(config.data, name) for name in (("train", "validation") if trains else ("validation",))
        ]
        device = Accelerator(mixed_precision="no").device
        encoders = [self._load(spec, device) for spec in models]
        for encoder in encoders:
            encoder.check_size(config.probe.crop_size, config.probe.crop_size)
            if config.probe.test_mode == "whole" and not encoder.is_student:
                raise ValueError(f"{encoder.name} takes only squares of one size: use probe.test_mode=slide.")
            if not trains:
                self._check_words(encoder)
        settings = {
            "method": config.method,
            "probe": config.probe.settings(),
            **data_settings(config.data, *self.splits),
            "text": fingerprint_checkpoint(config.text),
        }
        # a teacher sees squares of one size: the window's
        side = config.probe.crop_size
        return [Job.of(one, config.data.name, {**one.settings(), **settings}, side) for one in encoders]

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        config, text = self.config, settings.get("text")
        files = {f"{split.name} files": split.recognized(settings.get(f"{split.name} files")) for split in self.splits}
        probe = SegmentationConfig().settings() | settings.get("probe", {})  # what is new has its default
        # earlier versions knew a text tower by its place alone
        text = fingerprint_checkpoint(text) if text == config.text else text
        return {**settings, "text": text, "probe": probe, **files}

    def measure(self, job: Job, folder: Path) -> Measured:
        config, encoder = self.config, job.encoder
        clear_work(folder, config.overwrite)
        if config.method == "probe":
            report = segmentation_probe(encoder.features, encoder.name, config.data, config.probe, folder)
            counts = {name: report[name] for name in ("train_images", "validation_images")}
        else:
            report = self._without_training(encoder)
            counts = {"validation_images": report["images"]}
        return Measured(
            {name: report[name] for name in ("mIoU", "mAcc", "aAcc")},
            report["protocol"],
            {**counts, "pixels": report["pixels"], "pixels_left_out": report["pixels_left_out"]},
        )

    def _load(self, spec: str, device: torch.device) -> VisionEncoder:
        dtype, probe = self.config.dtype, self.config.probe
        if not ModelSpec.parse(spec).is_student and dtype == "float32":
            # a teacher computes in its own dtype and lets no autocast in
            dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[probe.mixed_precision]
        try:
            return load_encoder(spec, probe.crop_size, dtype, device, self.config.adaptor)
        except ValueError as error:
            raise ValueError(f"{spec} at probe.crop_size={probe.crop_size}: {error}") from error

    def _check_words(self, encoder: VisionEncoder) -> tuple[Any, str, str]:
        """The student, its language adaptor and the text tower; ValueError if one of them is missing."""
        method = self.config.method
        if not encoder.is_student or encoder.adaptor is None:
            raise ValueError(f"method={method} needs a student with a language adaptor; {encoder.name} is not one.")
        tower = self.config.text or encoder.text_tower()
        if not tower.startswith("open_clip:") and method == "projection":
            raise ValueError(f"The text tower {tower!r} is not an OpenCLIP model, which method=projection needs.")
        return encoder.model, encoder.adaptor, tower

    def _without_training(self, encoder: VisionEncoder) -> dict[str, Any]:
        config = self.config
        student, adaptor, tower = self._check_words(encoder)
        patches: Encoder
        if config.method == "summary_head":
            patches = summary_head_patches(student, adaptor)
        else:
            projection = PatchProjection(tower.removeprefix("open_clip:")).to(student.device)
            patches = projected_patches(student, adaptor, projection)
        names, templates = config.data.classes, openai_imagenet_templates()
        classifier = zero_shot_classifier(load_text_tower(tower), names, templates).to(student.device)
        how = f"{config.method} on patches, text tower {tower}, 80 templates"
        return dense_zero_shot(patches, encoder.name, classifier, config.data, config.probe, how)
