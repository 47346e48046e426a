"""The settings of `eval resolution`."""

from dataclasses import dataclass, field
from typing import Any

from transformers_radio.evaluation.classification.config import LabeledConfig, TextConfig
from transformers_radio.precision import DTYPES


@dataclass
class ResolutionConfig(TextConfig, LabeledConfig):
    """Settings of the task. `adaptor` and the texts are zero-shot's."""

    train_split: str = field(default="train", metadata={"help": "The images that are k-NN's neighbors: the bank."})
    sizes: list[Any] = field(
        default_factory=lambda: [224, 336, 432, 512, 768, 1024, [432, 768]],
        metadata={"help": "Sides in pixels or [height, width]; each becomes the nearest multiple that a model takes."},
    )
    reference: int | None = field(
        default=None, metadata={"help": "Side that the others are compared with. null: the model's own."}
    )
    flag_below: float = field(
        default=0.5, metadata={"help": "What has less than this share of its value at the reference is flagged."}
    )
    bank_images: int | None = field(default=5000, metadata={"help": "Drawn with seed 0. null: all."})
    images: int | None = field(default=1000, metadata={"help": "Of the split, drawn with seed 0. null: all."})
    feature_images: int = field(default=32, metadata={"help": "Of these, the ones whose patch features are compared."})
    k: int = field(default=20, metadata={"help": "Neighbors that vote."})
    temperature: float = field(
        default=0.07, metadata={"help": "A neighbor's vote is exp(cosine similarity / temperature)."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the models.", "choices": tuple(DTYPES)})
    batch_size: int = field(
        default=32, metadata={"help": "Images at the reference; other sizes take as many pixels at once."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the result."})
