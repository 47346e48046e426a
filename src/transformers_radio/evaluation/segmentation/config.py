"""The settings of segmentation: the set of images and masks, and the linear probe with the paper's numbers."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from transformers_radio.evaluation.run import load_config
from transformers_radio.precision import DTYPES

from .miou import IGNORE_INDEX

WARMUP = 1500  # iterations
METHODS = ("probe", "summary_head", "projection")
CHOICES = {
    "test_mode": ("slide", "whole"),
    "whole_fit": ("pad", "resize"),
    "mixed_precision": ("no", "bf16", "fp16"),
}


@dataclass
class SplitSource:
    """A part of a split: two folders below the set's path, or (with `split`) a split of a `datasets` source."""

    images: str | None = field(default=None, metadata={"help": "Folder of images."})
    masks: str | None = field(default=None, metadata={"help": "Folder of PNGs that have the images' names."})
    names: str | None = field(
        default=None,
        metadata={"help": "File with one image name per line, without extension. null: all images of the folder."},
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of a source that datasets.load_dataset opens, in place of the folders."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of such a source."})
    image_column: str = field(default="image", metadata={"help": "Column of images in such a source."})
    mask_column: str = field(default="annotation", metadata={"help": "Column of masks in such a source."})


@dataclass
class SegmentationData:
    """A segmentation set; see recipes/evaluation/ for ADE20K and PASCAL VOC 2012."""

    name: str = field(default=MISSING, metadata={"help": "What results call the set."})
    path: str = field(default=MISSING, metadata={"help": "Folder, or what datasets.load_dataset understands."})
    classes: list[str] = field(default=MISSING, metadata={"help": "Names, in the order of the class indices."})
    splits: dict[str, list[SplitSource]] = field(
        default=MISSING, metadata={"help": '"train" and "validation"; the parts of a split are joined.'}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "Masks number the classes from 1, and 0 means no class."}
    )
    ignore_index: int = field(default=IGNORE_INDEX, metadata={"help": "Value of mask pixels without a class."})
    license: str = field(default="", metadata={"help": "The set's, for people who read the recipe."})
    source: str = field(default="", metadata={"help": "Where to get the set."})


@dataclass
class SegmentationConfig:
    """The linear probe of AM-RADIO (section 5.3).

    The paper gives 160,000 iterations, AdamW, learning rate 1e-3, batch 16, crop 512 and a sliding window whose stride
    is two thirds of it. Betas, no weight decay, warm-up and schedule are those of its authors' published
    configurations (which train 80,000 iterations; DINOv2's original probe decays weights by 1e-4). Resize, crop and
    augmentation are the usual ones of ADE20K in mmsegmentation.
    """

    iterations: int = field(default=160_000, metadata={"help": "Training steps."})
    batch_size: int = field(default=16, metadata={"help": "Images per iteration, over all processes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The highest, after the warm-up."})
    beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment."})
    beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's second moment."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    warmup_iterations: int | None = field(
        default=None, metadata={"help": "null: 1500, but a tenth of the iterations if there are no more than 1500."}
    )
    warmup_ratio: float = field(
        default=1e-6, metadata={"help": "Share of the learning rate that the first iteration has."}
    )
    power: float = field(default=1.0, metadata={"help": "Exponent of the polynomial decay to 0."})

    long_side: int = field(
        default=2048,
        metadata={"help": "Pixels: images keep their shape and are scaled as far as long and short side allow."},
    )
    short_side: int = field(default=512, metadata={"help": "Pixels; see long_side."})
    scale_min: float = field(
        default=0.5,
        metadata={"help": "Training: both sides are multiplied by a random factor, which is at least this."},
    )
    scale_max: float = field(default=2.0, metadata={"help": "The largest such factor."})
    crop_size: int = field(default=512, metadata={"help": "Pixels: side of training crops and of the sliding window."})
    max_class_share: float = field(
        default=0.75, metadata={"help": "Crops with more of one class are drawn again, ten times at most."}
    )
    flip_probability: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    photometric_distortion: bool = field(default=True, metadata={"help": "Change colors in training."})

    test_mode: str = field(
        default="slide",
        metadata={"help": "slide: a window of crop_size; whole: the image at once.", "choices": CHOICES["test_mode"]},
    )
    stride: int = field(default=341, metadata={"help": "Step of the sliding window, in pixels."})
    whole_fit: str = field(
        default="pad",
        metadata={
            "help": "How a whole image is brought to multiples of size_divisor.",
            "choices": CHOICES["whole_fit"],
        },
    )
    size_divisor: int = field(default=16, metadata={"help": "The encoder's min_resolution_step."})

    seed: int = field(
        default=0, metadata={"help": "For the head's weights, the order of the images and the augmentation."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read images, for each training process."})
    mixed_precision: str = field(
        default="no",
        metadata={
            "help": "Autocast of the encoder. The head and the loss are float32.",
            "choices": CHOICES["mixed_precision"],
        },
    )
    checkpoint_every: int = field(default=1000, metadata={"help": "Iterations from one checkpoint to the next."})

    def __post_init__(self) -> None:
        if self.mixed_precision == "False":  # YAML reads a bare no as false
            self.mixed_precision = "no"

    @property
    def warmup(self) -> int:
        """Iterations of warm-up."""
        if self.warmup_iterations is None:
            return WARMUP if self.iterations > WARMUP else self.iterations // 10
        return self.warmup_iterations

    def settings(self) -> dict[str, Any]:
        """All fields, as they are used."""
        return asdict(self) | {"warmup_iterations": self.warmup}

    def check(self) -> None:
        """Raises ValueError that names the field as recipes do (`probe.NAME`), its value and the fix."""
        positive = ("iterations", "batch_size", "learning_rate", "long_side", "short_side", "crop_size", "stride")
        for name in (*positive, "size_divisor", "checkpoint_every", "scale_min", "warmup_ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"probe.{name} is {getattr(self, name)}; expected more than 0.")
        if not 0 <= self.warmup < self.iterations:
            raise ValueError(
                f"probe.warmup_iterations is {self.warmup}; expected 0 to {self.iterations - 1}, less than "
                "probe.iterations, or null."
            )
        if self.scale_max < self.scale_min:
            raise ValueError(f"probe.scale_max is {self.scale_max}; expected at least scale_min ({self.scale_min}).")
        if self.short_side > self.long_side:
            raise ValueError(f"probe.short_side is {self.short_side}; expected at most long_side ({self.long_side}).")
        if self.crop_size % self.size_divisor:
            nearest = max(1, round(self.crop_size / self.size_divisor)) * self.size_divisor
            raise ValueError(
                f"probe.crop_size is {self.crop_size}, not a multiple of size_divisor ({self.size_divisor}); use "
                f"{nearest}."
            )
        if self.stride > self.crop_size:
            raise ValueError(
                f"probe.stride is {self.stride}; above crop_size ({self.crop_size}) it would leave out pixels."
            )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"probe.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")

    def learning_rate_at(self, iteration: int) -> float:
        """Linear from warmup_ratio to 1 times the learning rate, then (1 - progress)^power, for iterations from 0."""
        if iteration < self.warmup:
            progress = iteration / self.warmup
            return self.learning_rate * (self.warmup_ratio + (1 - self.warmup_ratio) * progress)
        progress = (iteration - self.warmup) / (self.iterations - self.warmup)
        return self.learning_rate * (1 - progress) ** self.power

    @property
    def test_protocol(self) -> str:
        """For example "512 pixels, sliding window 512, stride 341; encoder in bf16"."""
        precision = "" if self.mixed_precision == "no" else f"; encoder in {self.mixed_precision}"
        if self.test_mode == "slide":
            return f"{self.short_side} pixels, sliding window {self.crop_size}, stride {self.stride}{precision}"
        fitted = "padded" if self.whole_fit == "pad" else "resized"
        return f"{self.short_side} pixels, whole image {fitted} to multiples of {self.size_divisor}{precision}"


@dataclass
class SegmentationTaskConfig:
    """Settings of the task; recipes/evaluation/ade20k.yaml and voc2012.yaml have those of the paper."""

    data: SegmentationData = field(default_factory=SegmentationData, metadata={"help": "Images and masks."})
    probe: SegmentationConfig = field(
        default_factory=SegmentationConfig, metadata={"help": "Training of the probe, and how an image is segmented."}
    )
    method: str = field(
        default="probe",
        metadata={
            "help": "probe: a trained linear head. Without training, a student's patches against the classes' names: "
            "summary_head: through the language adaptor's summary head; projection: the adaptor's features through "
            "CLIP's projection.",
            "choices": METHODS,
        },
    )
    text: str | None = field(
        default=None,
        metadata={
            "help": "Text tower, open_clip:CHECKPOINT or transformers:CHECKPOINT. null: that of the adaptor's teacher."
        },
    )
    adaptor: str | None = field(
        default=None, metadata={"help": "The student's language adaptor, for the methods without training."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the encoder.", "choices": tuple(DTYPES)})
    overwrite: bool = field(default=False, metadata={"help": "Replace the result and the probe."})


def load_segmentation_task(path: str | Path, overrides: list[str] | None = None) -> SegmentationTaskConfig:
    """Reads recipes/evaluation/*.yaml, with `key=value` overrides such as `probe.iterations=80000 data.path=ADE`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a field that does not exist, is missing, or has a value that cannot be used.
    """
    config = load_config(SegmentationTaskConfig, None, path, overrides)
    assert isinstance(config, SegmentationTaskConfig)
    config.probe.check()
    return config
