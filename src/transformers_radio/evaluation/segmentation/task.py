"""`eval segmentation`: the linear probe, or classes by words alone, on ADE20K, PASCAL VOC or a set of one's own."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from transformers_radio.evaluation.classification.zero_shot import openai_imagenet_templates, zero_shot_classifier
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.paths import fingerprint_checkpoint
from transformers_radio.evaluation.result import Result, done, result_path, work_folder
from transformers_radio.modeling import RadioModel

from .config import SegmentationConfig
from .data import SegmentationData, SegmentationSplit, data_settings
from .inference import Encoder
from .probe import segmentation_probe
from .words import PatchProjection, dense_zero_shot, projected_patches, summary_head_patches

METHODS = ("probe", "summary_head", "projection")
# What a result is known by, of its settings; those of the probe without training are how an image is segmented.
RESULT_COUNTED = (*ENCODER_COUNTED, "method", "classes", "reduce_labels", "ignore_index")
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


@dataclass
class SegmentationTaskConfig:
    """Settings of the task; recipes/evaluation/ade20k.yaml and voc2012.yaml have those of the paper."""

    data: SegmentationData = field(default_factory=SegmentationData)
    probe: SegmentationConfig = field(default_factory=SegmentationConfig)
    # probe: a trained linear head. Without training, a student's patches against the classes' names:
    # summary_head: through the language adaptor's summary head; projection: its features through CLIP's projection.
    method: str = "probe"
    text: str | None = None  # text tower, as open_clip:... or transformers:...; null: the adaptor's teacher's
    adaptor: str | None = None  # the student's, for the methods without training
    dtype: str = "float32"  # of the encoder
    overwrite: bool = False


def run(models: list[str], config: SegmentationTaskConfig, output: Path) -> list[Result]:
    """One `Result` a model: mIoU, mAcc and aAcc in percent; IoU per class is in the work folder's result.json.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before any training.
    """
    config.probe.check()
    if config.method not in METHODS:
        raise ValueError(f"method is {config.method!r}; expected one of {', '.join(METHODS)}.")
    names = ("train", "validation") if config.method == "probe" else ("validation",)
    splits = [SegmentationSplit(config.data, name) for name in names]
    device = Accelerator(mixed_precision="no").device
    # A teacher sees squares of one size: the window's.
    encoders = [_load(spec, config, device) for spec in models]
    for encoder in encoders:
        encoder.check_size(config.probe.crop_size, config.probe.crop_size)
        if config.probe.test_mode == "whole" and not encoder.is_student:
            raise ValueError(f"{encoder.name} takes only squares of one size: use probe.test_mode=slide.")
        if config.method != "probe":
            _check_words(encoder, config)
    return [_measure(encoder, splits, config, output) for encoder in encoders]


def _load(spec: str, config: SegmentationTaskConfig, device: torch.device) -> VisionEncoder:
    dtype = config.dtype
    if not ModelSpec.parse(spec).is_student and dtype == "float32":
        # a teacher computes in its own dtype and lets no autocast in
        dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.probe.mixed_precision]
    try:
        return load_encoder(spec, config.probe.crop_size, dtype, device, config.adaptor)
    except ValueError as error:
        raise ValueError(f"{spec} at probe.crop_size={config.probe.crop_size}: {error}") from error


def _measure(
    encoder: VisionEncoder, splits: list[SegmentationSplit], config: SegmentationTaskConfig, output: Path
) -> Result:
    task = "segmentation" if config.method == "probe" else f"segmentation-{config.method}"
    path = result_path(output, encoder.name, task, config.data.name)
    folder = work_folder(path)
    settings = {
        **encoder.settings(),
        "method": config.method,
        "probe": config.probe.settings(),
        **data_settings(config.data, *splits),
        "text": fingerprint_checkpoint(config.text),
    }

    def before(there: dict[str, Any]) -> dict[str, Any]:
        text = settings["text"] if there.get("text") == config.text else there.get("text")
        files = {f"{split.name} files": split.recognized(there.get(f"{split.name} files")) for split in splits}
        probe = SegmentationConfig().settings() | there.get("probe", {})  # what is new has its default
        return {**there, "text": text, "probe": probe, **files}

    of_method = ("train files", *TRAINING) if config.method == "probe" else ("text",)
    counted = (*RESULT_COUNTED, *of_method, "validation files", *INFERENCE)
    finished = done(path, settings, counted, config.overwrite, before)
    if finished is not None:
        return finished
    if config.overwrite and folder.exists() and Accelerator(mixed_precision="no").is_main_process:
        shutil.rmtree(folder)
    if config.method == "probe":
        report = segmentation_probe(encoder.features, encoder.name, config.data, config.probe, folder)
        counts = {name: report[name] for name in ("train_images", "validation_images")}
    else:
        report = _without_training(encoder, config)
        counts = {"validation_images": report["images"]}
    result = Result(
        "segmentation",
        encoder.name,
        config.data.name,
        {name: report[name] for name in ("mIoU", "mAcc", "aAcc")},
        report["protocol"],
        settings,
        counts | {"pixels": report["pixels"], "pixels_left_out": report["pixels_left_out"]},
        encoder.params,
        config.probe.crop_size,
    )
    if Accelerator(mixed_precision="no").is_main_process:
        result.write(path)
    return result


def _check_words(encoder: VisionEncoder, config: SegmentationTaskConfig) -> tuple[RadioModel, str, str]:
    """The student, its language adaptor and the text tower; ValueError where there is none."""
    if not isinstance(encoder.model, RadioModel) or encoder.adaptor is None:
        raise ValueError(f"method={config.method} needs a student with a language adaptor; {encoder.name} is none.")
    tower = config.text or encoder.text_tower()
    if not tower.startswith("open_clip:") and config.method == "projection":
        raise ValueError(f"The text tower {tower!r} is no OpenCLIP model, which method=projection needs.")
    return encoder.model, encoder.adaptor, tower


def _without_training(encoder: VisionEncoder, config: SegmentationTaskConfig) -> dict:
    student, adaptor, tower = _check_words(encoder, config)
    patches: Encoder
    if config.method == "summary_head":
        patches = summary_head_patches(student, adaptor)
    else:
        projection = PatchProjection(tower.removeprefix("open_clip:")).to(student.device)
        patches = projected_patches(student, adaptor, projection)
    classifier = zero_shot_classifier(load_text_tower(tower), config.data.classes, openai_imagenet_templates()).to(
        student.device
    )
    how = f"{config.method} on patches, text tower {tower}, 80 templates"
    return dense_zero_shot(patches, encoder.name, classifier, config.data, config.probe, how)
