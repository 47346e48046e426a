"""What k-NN and zero-shot share: the settings of a classification set, the models, and how summaries are stored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from omegaconf import MISSING

from transformers_radio.evaluation.images.labelled import LabelledSplit
from transformers_radio.evaluation.images.summaries import StoreConfig, SummaryStore, store_summaries
from transformers_radio.evaluation.models.encoder import (
    ENCODER_COUNTED,
    VisionEncoder,
    load_encoder,
    split_spec,
    split_title,
)
from transformers_radio.evaluation.paths import path_name
from transformers_radio.evaluation.task import Job
from transformers_radio.precision import DTYPES


@dataclass
class ClassificationConfig:
    """Settings that both tasks have; recipes/evaluation/imagenet1k.yaml has those of ImageNet."""

    data: str = field(
        default=MISSING,
        metadata={"help": "Class folders, webdataset tars with .cls, Parquet, or a Hub id: what load_dataset opens."},
    )
    name: str | None = field(
        default=None, metadata={"help": "What results call the data. null: the last part of `data`."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several."}
    )
    split: str = field(default="validation", metadata={"help": "The images that are classified."})
    image_column: str | None = field(default=None, metadata={"help": "null: found among the usual names."})
    label_column: str | None = field(default=None, metadata={"help": "null: found among the usual names."})
    licence: str = field(default="", metadata={"help": "The data's, for people who read the recipe."})
    source: str = field(default="", metadata={"help": "Where to get the data."})
    image_size: Any = field(
        default=None,
        metadata={
            "help": "Pixels. [height, width]: images are scaled to cover them, and the center is cut out. A number: "
            "the shortest side, the aspect ratio kept, sides rounded to what the model takes; for students only. "
            "null: a square of the model's own side."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the model.", "choices": tuple(DTYPES)})
    store_dtype: str = field(
        default="float32", metadata={"help": "Of the summaries on disk.", "choices": tuple(DTYPES)}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Images of one size that are encoded together, in each process."}
    )
    num_workers: int = field(default=4, metadata={"help": "Threads that read and decode images, in each process."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the result and its stored summaries."})

    @property
    def title(self) -> str:
        return self.name or path_name(self.data)


def open_split(config: ClassificationConfig, split: str, limit: int | None = None) -> LabelledSplit:
    return LabelledSplit(config.data, split, config.config_name, config.image_column, config.label_column, limit)


def load_encoders(models: list[str], config: ClassificationConfig, adaptor: str | None = None) -> list[VisionEncoder]:
    """All models, on Accelerate's device.

    Raises:
        ValueError: an image size that one of them cannot take, wrong settings of the store, and what `load_encoder`
            raises.
    """
    size = config.image_size
    sides = size if isinstance(size, list) and len(size) == 2 else [size] if size is not None else []
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"image_size is {size!r}; expected a side in pixels, [height, width] or null.")
    encoders = []
    for spec in models:
        is_student = split_spec(split_title(spec)[1])[0] == "student"
        if len(sides) == 1 and not is_student:
            raise ValueError(
                f"{spec} takes only squares, but image_size={size} keeps the aspect ratio: use "
                f"image_size=[{size},{size}]."
            )
        built_for = sides[0] if len(set(sides)) == 1 else None
        encoder = load_encoder(spec, built_for, config.dtype, PartialState().device, adaptor if is_student else None)
        if len(sides) == 2:
            encoder.check_size(*sides)
        store_config(encoder, config).check()
        encoders.append(encoder)
    return encoders


def store_config(encoder: VisionEncoder, config: ClassificationConfig) -> StoreConfig:
    """How the images of this model's stores are made."""
    size = config.image_size
    if size is None:
        size = (encoder.image_size, encoder.image_size)
    return StoreConfig(
        size if isinstance(size, int) else (size[0], size[1]),
        encoder.step,
        config.store_dtype,
        config.batch_size,
        config.num_workers,
    )


def store_split(job: Job, split: LabelledSplit, folder: Path, config: ClassificationConfig) -> SummaryStore:
    """The summaries of a split, encoded by `VisionEncoder.summary` or `.language` as `job.settings["output"]` says."""
    encoder = job.encoder
    names = ("model", *ENCODER_COUNTED, "output")
    encoded_by = {name: job.settings[name] for name in names if name in job.settings}
    encode = getattr(encoder, job.settings["output"])
    title = f"{encoder.name} {split.split}"
    return store_summaries(folder, encode, encoded_by, split, store_config(encoder, config), title)


def resolution(stored: StoreConfig) -> int | list[int]:
    """The resolution in results: one number for squares and for a shortest side, otherwise [height, width]."""
    if isinstance(stored.image_size, int):
        return stored.image_size
    height, width = stored.image_size
    return height if height == width else [height, width]
