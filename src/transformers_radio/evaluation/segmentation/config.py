"""The numbers of the linear segmentation probe, with the paper's values as defaults."""

from dataclasses import asdict, dataclass
from typing import Any

WARMUP = 1500  # iterations


@dataclass
class SegmentationConfig:
    """The linear probe of AM-RADIO (section 5.3).

    The paper gives 160,000 iterations, AdamW, learning rate 1e-3, batch 16, crop 512 and a sliding window whose stride
    is two thirds of it. Betas, no weight decay, warm-up and schedule are those of its authors' published
    configurations (which train 80,000 iterations; DINOv2's original probe decays weights by 1e-4). Resize, crop and
    augmentation are the usual ones of ADE20K in mmsegmentation.
    """

    iterations: int = 160_000
    batch_size: int = 16  # images an iteration, over all processes
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    warmup_iterations: int | None = None  # null: 1500, of a probe that is not longer a tenth
    warmup_ratio: float = 1e-6  # of the learning rate, at the first iteration
    power: float = 1.0  # of the polynomial decay to 0

    # Images are scaled, with their shape kept, as far as long and short side allow.
    long_side: int = 2048
    short_side: int = 512
    scale_min: float = 0.5  # training only: both limits times a random factor
    scale_max: float = 2.0
    crop_size: int = 512
    max_class_share: float = 0.75  # crops with more of one class are drawn again, ten times at most
    flip_probability: float = 0.5
    photometric_distortion: bool = True

    test_mode: str = "slide"  # slide: a window of crop_size; whole: the image at once
    stride: int = 341  # of the window
    whole_fit: str = "pad"  # pad | resize: how a whole image comes to multiples of size_divisor
    size_divisor: int = 16  # the encoder's min_resolution_step

    seed: int = 0
    num_workers: int = 2
    mixed_precision: str = "no"  # no | bf16 | fp16: autocast of the encoder; the head and the loss are float32
    checkpoint_every: int = 1000  # iterations

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
                f"probe.crop_size is {self.crop_size}, no multiple of size_divisor ({self.size_divisor}); use "
                f"{nearest}."
            )
        if self.stride > self.crop_size:
            raise ValueError(
                f"probe.stride is {self.stride}; above crop_size ({self.crop_size}) it would leave out pixels."
            )
        choices = {
            "test_mode": ("slide", "whole"),
            "whole_fit": ("pad", "resize"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
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
        """Such as "512 pixels, sliding window 512, stride 341; encoder in bf16"."""
        precision = "" if self.mixed_precision == "no" else f"; encoder in {self.mixed_precision}"
        if self.test_mode == "slide":
            return f"{self.short_side} pixels, sliding window {self.crop_size}, stride {self.stride}{precision}"
        fitted = "padded" if self.whole_fit == "pad" else "resized"
        return f"{self.short_side} pixels, whole image {fitted} to multiples of {self.size_divisor}{precision}"
