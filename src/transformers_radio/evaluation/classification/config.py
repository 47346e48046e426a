"""The settings of k-NN and zero-shot; those that other tasks have too are in `LabeledConfig` and `TextConfig`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from transformers_radio.evaluation.paths import path_name
from transformers_radio.precision import DTYPES

from .words import OPENAI_IMAGENET


@dataclass
class LabeledConfig:
    """A set of labeled images."""

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

    @property
    def title(self) -> str:
        return self.name or path_name(self.data)


@dataclass
class TextConfig:
    """How classes are told to a model in texts."""

    classes: Any = field(
        default=None,
        metadata={
            "help": "Names of the classes in the order of the labels: a text file with one per line, a list, or "
            "openai_imagenet for those that OpenAI published for ImageNet-1k. null: the names that the data states."
        },
    )
    templates: Any = field(
        default=OPENAI_IMAGENET,
        metadata={"help": "A text file with one per line, {} standing for the name; a list; or OpenAI's 80."},
    )
    text: str | None = field(
        default=None,
        metadata={"help": "Text tower, open_clip:CHECKPOINT or transformers:CHECKPOINT. null: the adaptor's teacher."},
    )
    adaptor: str | None = field(
        default=None,
        metadata={"help": "The student's adaptor that is read. null: the one to a teacher with a text tower."},
    )


@dataclass
class ClassificationConfig(LabeledConfig):
    """Settings that both tasks have; recipes/evaluation/imagenet1k.yaml has those of ImageNet."""

    license: str = field(default="", metadata={"help": "The data's, for people who read the recipe."})
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


@dataclass
class KnnConfig(ClassificationConfig):
    """Settings of k-NN; the defaults are the paper's."""

    train_split: str = field(default="train", metadata={"help": "The images that are the neighbors: the bank."})
    train_limit: int | None = field(
        default=None, metadata={"help": "Only the first so many images of the bank, for a trial. null: all."}
    )
    k: int = field(default=20, metadata={"help": "Neighbors that vote."})
    temperature: float = field(
        default=0.07, metadata={"help": "A neighbor's vote is exp(cosine similarity / temperature)."}
    )
    memory_gb: float = field(default=4.0, metadata={"help": "Memory for the search, in each process."})


@dataclass
class ZeroShotConfig(TextConfig, ClassificationConfig):
    """Settings of zero-shot; the defaults are the paper's."""
