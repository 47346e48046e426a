"""What k-NN and zero-shot share: the classification set, the models, and how summaries are stored."""

from pathlib import Path

from accelerate import PartialState

from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.images.summaries import StoreConfig, SummaryStore, store_summaries
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.task import Job

from .config import ClassificationConfig


def open_split(config: ClassificationConfig, split: str, limit: int | None = None) -> LabeledSplit:
    return LabeledSplit(config.data, split, config.config_name, config.image_column, config.label_column, limit)


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


def store_split(job: Job, split: LabeledSplit, folder: Path, config: ClassificationConfig) -> SummaryStore:
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
