"""What k-NN and zero-shot have in common: the classification set, the models, the size of the images."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from omegaconf import MISSING

from transformers_radio.evaluation.images.labelled import LabelledSplit
from transformers_radio.evaluation.images.summaries import StoreConfig
from transformers_radio.evaluation.models.encoder import VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.paths import path_name

from .words import OPENAI_IMAGENET


@dataclass
class ClassificationConfig:
    """Settings that both tasks have; recipes/evaluation/imagenet1k.yaml has those of ImageNet."""

    data: str = MISSING  # class folders, webdataset tars with .cls, Parquet, or a Hub id: what load_dataset opens
    name: str | None = None  # of the data, in results; null: the last part of `data`
    config_name: str | None = None  # of a Hub dataset that has several
    train_split: str = "train"  # the bank of k-NN
    split: str = "validation"  # that is classified
    image_column: str | None = None  # null: found among the usual names
    label_column: str | None = None
    # For zero-shot: a text file with one name a line in the order of the labels, a list, or openai_imagenet for those
    # that OpenAI published for ImageNet-1k; null: the names that the data states.
    classes: Any = None
    templates: Any = OPENAI_IMAGENET  # a text file with one template a line, {} for the name; a list; or OpenAI's 80
    licence: str = ""
    source: str = ""  # where to get it
    # [height, width]: scaled to cover them, centre cut out. A number: the shortest side, the aspect ratio kept, sides
    # rounded to what the model takes; only for students. null: the model's own side, twice.
    image_size: Any = None
    dtype: str = "float32"  # of the model
    store_dtype: str = "float32"  # of the summaries on disk
    batch_size: int = 64  # images of one size that are encoded together, in each process
    num_workers: int = 4  # threads that read and decode, in each process
    overwrite: bool = False

    @property
    def title(self) -> str:
        return self.name or path_name(self.data)


def open_split(config: ClassificationConfig, split: str, limit: int | None = None) -> LabelledSplit:
    return LabelledSplit(config.data, split, config.config_name, config.image_column, config.label_column, limit)


def load_encoders(models: list[str], config: ClassificationConfig, adaptor: str | None = None) -> list[VisionEncoder]:
    """All models, on Accelerate's device.

    Raises:
        ValueError: an image size that one of them cannot take, and what `load_encoder` raises.
    """
    size = config.image_size
    sides = size if isinstance(size, list) and len(size) == 2 else [size] if size is not None else []
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"image_size is {size!r}; expected a side in pixels, [height, width] or null.")
    encoders = []
    for spec in models:
        is_student = ModelSpec.parse(spec).is_student
        if len(sides) == 1 and not is_student:
            raise ValueError(
                f"{spec} takes only squares, but image_size={size} keeps the aspect ratio: use "
                f"image_size=[{size},{size}]."
            )
        built_for = sides[0] if len(set(sides)) == 1 else None
        encoder = load_encoder(spec, built_for, config.dtype, PartialState().device, adaptor if is_student else None)
        if len(sides) == 2:
            encoder.check_size(*sides)
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


def resolution(stored: StoreConfig) -> int | list[int]:
    """As results state it: one number for squares and for a shortest side, else [height, width]."""
    if isinstance(stored.image_size, int):
        return stored.image_size
    height, width = stored.image_size
    return height if height == width else [height, width]


def clear_work(folder: Path, overwrite: bool) -> None:
    """Removes what an earlier run left, if it is to be replaced; on all processes."""
    state = PartialState()
    state.wait_for_everyone()
    if overwrite and state.is_main_process and folder.exists():
        shutil.rmtree(folder)
    state.wait_for_everyone()
