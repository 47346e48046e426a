"""Any frozen vision model behind one interface: a summary, patch features, and language if it has a text tower."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.modeling import RadioConfig, RadioModel, student_class
from transformers_radio.modeling.errors_radio import check_layout, naming_checkpoint
from transformers_radio.precision import DTYPES
from transformers_radio.teachers import Teacher, build_teacher, digest_weights, has_text

from .specs import HEADS, ModelSpec

Features = tuple[torch.Tensor, tuple[int, int]]
# The part of `VisionEncoder.settings` by which a result is known: all but where the model lies.
ENCODER_COUNTED = ("weights", "dtype", "summary", "features", "adaptor")


@dataclass
class Encoded:
    """What `VisionEncoder.encode` gives, float32 on the images' device.

    summary: (B, D), what k-NN compares.
    features: (B, h*w, C), row-major over the grid.
    grid: (h, w).
    language: (B, E), in the space of a text tower, or None.
    """

    summary: torch.Tensor
    features: torch.Tensor
    grid: tuple[int, int]
    language: torch.Tensor | None


class VisionEncoder(nn.Module):
    """One model, frozen and in eval mode, at one default resolution: a `VisionStudent` or a `VisionTeacher`.

    Every method takes float RGB images in [0, 1], (B, 3, H, W), on the encoder's device, and returns float32. A
    student takes sides that are multiples of `step`; a teacher only squares of its `image_size`.

    Attributes:
        name: what tables call it.
        spec: where it was loaded from.
        model: the student or `Teacher`.
        image_size: default side in pixels.
        step: sides must be multiples of it.
        params: number of weights; without a student's adaptors, which belong to the teachers.
        adaptor: the student's adaptor that `language` reads, or None.
    """

    is_student: bool
    adaptor: str | None = None

    def __init__(self, spec: ModelSpec, model: nn.Module, image_size: int, step: int):
        super().__init__()
        self.name = spec.title
        self.spec = spec
        self.model: Any = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.step = step
        self.params = count_parameters(model) - count_parameters(getattr(model, "adaptors", None))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def summary(self, images: torch.Tensor) -> torch.Tensor:
        """What k-NN compares, (B, D): a student's backbone summary, a teacher's, or the mean of its features."""
        raise NotImplementedError

    def features(self, images: torch.Tensor) -> Features:
        """Patch features (B, h*w, C), row-major, and the grid (h, w)."""
        raise NotImplementedError

    def language(self, images: torch.Tensor) -> torch.Tensor:
        """Summaries in the space of `text_tower`, (B, D).

        Raises:
            ValueError: the model has no such summaries.
        """
        raise NotImplementedError

    def encode(self, images: torch.Tensor) -> Encoded:
        """All of these from one forward pass; `language` is None for a model without it."""
        raise NotImplementedError

    def text_tower(self) -> str:
        """TYPE:CHECKPOINT of the text tower that shares the space of `language`.

        Raises:
            ValueError: there is none.
        """
        raise NotImplementedError

    def choices(self) -> dict[str, str]:
        """Which summary and which features these are, for reports."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Where the model came from, and what results depend on (`ENCODER_COUNTED`): its weights, its dtype and which
        outputs are read."""
        return {
            "model": str(self.spec),
            "weights": digest_weights(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.choices(),
            **({} if self.adaptor is None else {"adaptor": self.adaptor}),
        }

    def check_size(self, height: int, width: int) -> None:
        """ValueError with the nearest sizes that fit, unless images of this size can be encoded."""
        if height % self.step or width % self.step or min(height, width) < self.step:
            nearest = [max(1, round(side / self.step)) * self.step for side in (height, width)]
            raise ValueError(
                f"{self.name} takes sides that are multiples of {self.step}, not {height} x {width}: use "
                f"{nearest[0]} x {nearest[1]}."
            )


class VisionStudent(VisionEncoder):
    """A student of any type in `STUDENTS`.

    Args:
        image_size: default side in pixels; None for the student's preferred one.
        adaptor: the one that `language` reads, to a teacher with a text tower; None for a student without one.

    Raises:
        ValueError: a side that is not a multiple of the step.
    """

    is_student = True

    def __init__(self, spec: ModelSpec, student: Any, image_size: int | None, adaptor: str | None):
        side = student.preferred_resolution if image_size is None else image_size
        super().__init__(spec, student, side, student.min_resolution_step)
        self.adaptor = adaptor
        self.check_size(side, side)

    @torch.no_grad()
    def summary(self, images: torch.Tensor) -> torch.Tensor:
        return self._run(images).summary.float()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        output = self._run(images)
        return output.features.float(), output.grid

    @torch.no_grad()
    def language(self, images: torch.Tensor) -> torch.Tensor:
        adaptor = self._language_adaptor()
        return self._run(images, adaptor).adaptors[adaptor].summary.float()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Encoded:
        output = self._run(images, *([] if self.adaptor is None else [self.adaptor]))
        language = None if self.adaptor is None else output.adaptors[self.adaptor].summary.float()
        return Encoded(output.summary.float(), output.features.float(), output.grid, language)

    def text_tower(self) -> str:
        adaptor = self._language_adaptor()
        teacher = self.model.config.adaptors[adaptor]["teacher"]
        if has_text(teacher) is False:
            raise ValueError(
                f"The adaptor {adaptor!r} of {self.spec} does not say whose text tower it speaks (its teacher is "
                f"{teacher!r}): give it with text=TYPE:CHECKPOINT, such as open_clip:ViT-H-14:dfn5b."
            )
        return teacher

    def choices(self) -> dict[str, str]:
        config = self.model.config
        summary, features, windows = "the student's own summary", "the student's own patch features", ""
        if hasattr(config, "summary_type"):  # a transformer's
            tokens = f"class tokens {config.summary_idxs} of the backbone"
            summary = "mean of the patch tokens" if config.summary_type == "mean" else tokens
            features = "last patch tokens"
            windows = f", windows of {config.window_size} patches" if config.window_size else ""
        return {
            "summary": f"{summary}, {self.model.summary_dim} wide",
            "features": f"{features}, {self.model.feature_dim} wide{windows}",
        }

    def _run(self, images: torch.Tensor, *adaptors: str) -> Any:
        return self.model(images.to(self.model.dtype), adaptors=list(adaptors))

    def _language_adaptor(self) -> str:
        if self.adaptor is None:
            known = ", ".join(self.model.config.adaptors) or "no adaptors"
            raise ValueError(
                f"{self.spec} has no adaptor to a teacher with a text tower (it has {known}): name one with "
                "adaptor=..., or distill a student with a CLIP or SigLIP teacher."
            )
        return self.adaptor


class VisionTeacher(VisionEncoder):
    """A frozen `Teacher`, which takes squares of its `image_size` only."""

    is_student = False

    def __init__(self, spec: ModelSpec, teacher: Teacher):
        super().__init__(spec, teacher, teacher.image_size, teacher.patch_size)

    @torch.no_grad()
    def summary(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images).summary

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        output = self.model(images)
        return output.features, output.grid

    @torch.no_grad()
    def language(self, images: torch.Tensor) -> torch.Tensor:
        self.text_tower()
        return self.model(images).summary

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Encoded:
        output = self.model(images)
        summary = output.features.mean(dim=1) if output.summary is None else output.summary
        return Encoded(summary, output.features, output.grid, output.summary if self.model.has_text else None)

    def text_tower(self) -> str:
        if not self.model.has_text:
            raise ValueError(f"{self.spec} has no text tower, so it cannot be asked in words.")
        return f"{self.spec.kind}:{self.spec.checkpoint}"

    def choices(self) -> dict[str, str]:
        summary_dim, feature_dim = self.model.summary_dim, self.model.feature_dim
        summary = "mean of the features (it has no summary)" if summary_dim is None else "the teacher's own summary"
        return {
            "summary": f"{summary}, {feature_dim if summary_dim is None else summary_dim} wide",
            "features": f"the teacher's own patch features, {feature_dim} wide",
        }

    def check_size(self, height: int, width: int) -> None:
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} was built for {self.image_size} x {self.image_size} pixels and cannot take {height} x "
                f"{width}: load it with another image_size, and square."
            )
        super().check_size(height, width)


def load_encoder(
    name: str,
    image_size: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    adaptor: str | None = None,
    window_size: int | None = None,
) -> VisionEncoder:
    """Loads a model to evaluate.

    Args:
        name: a folder or Hub id (a student, a native transformers RADIO, or any vision model of transformers that is
            a teacher), or TYPE:CHECKPOINT with one of the teachers' types; `TITLE=` before it names the row, and
            `@SIZE` behind it is its side in pixels where `image_size` is None.
        image_size: default side of the input in pixels; None for the model's own.
        dtype: of weights and activations: "float32", "bfloat16" or "float16".
        adaptor: the student's adaptor that zero-shot reads; None for the one to a teacher with a text tower, where
            there is exactly one, or the one named "clip".
        window_size: of a student's attention, in patches; None for its own default, 0 for global attention. Teachers
            keep theirs.

    Raises:
        ValueError: an unknown type, dtype or adaptor, a size that the model does not take, weights that do not fit.
        OSError: no such folder or Hub id.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    spec = ModelSpec.parse(name)
    image_size = spec.image_size if image_size is None else image_size
    if spec.is_student:
        student = load_student(spec.checkpoint, dtype)
        if window_size is not None:
            if not hasattr(student.config, "window_size"):
                raise ValueError(f"{name} has no attention windows: leave window_size out.")
            student.config.window_size = window_size or None  # its step and what `choices` says follow
        adaptor = language_adaptor(student.config.adaptors, adaptor, name)
        return VisionStudent(spec, student, image_size, adaptor).to(device)
    if adaptor is not None:
        raise ValueError(f"{name} is no student, so it has no adaptor {adaptor!r}: leave adaptor out.")
    return VisionTeacher(spec, build_teacher(spec.kind, spec.checkpoint, image_size, dtype)).to(device)


def load_student(checkpoint: str, dtype: str = "float32") -> Any:
    """A student of any type in `STUDENTS`, also out of a backbone's or tower's checkpoint; or a release of NVIDIA or a
    RADIO of transformers' own class, which is converted in memory.

    Raises:
        OSError, ValueError: There is none, or it is damaged or of another kind; the checkpoint is named.
    """
    check_layout("load_student", checkpoint)
    with naming_checkpoint(checkpoint):
        written = PretrainedConfig.get_config_dict(checkpoint)[0]
    model_type = str(written.get("model_type"))
    if "args" in written or (model_type == RadioConfig.model_type and "adaptors" not in written):
        return load_nvidia_checkpoint(checkpoint).to(DTYPES[dtype])
    found = RadioModel if model_type in HEADS else student_class(model_type)
    return found.from_pretrained(checkpoint, dtype=DTYPES[dtype])


def count_parameters(module: nn.Module | None) -> int:
    """Number of weights; 0 for None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def language_adaptor(adaptors: dict[str, dict[str, Any]], chosen: str | None, name: str) -> str | None:
    """`chosen`, if it has a summary; else the adaptor to a teacher with a text tower, where there is exactly one, or
    the one named "clip".

    Raises:
        ValueError: `chosen` has no summary, or there is no such adaptor; `name` is the student's.
    """
    with_summary = [key for key, one in adaptors.items() if one["summary_dim"] is not None]
    if chosen is not None:
        if chosen not in with_summary:
            raise ValueError(
                f"{name} has no adaptor {chosen!r} with a summary; it has {', '.join(with_summary) or 'none'}."
            )
        return chosen
    if "clip" in adaptors:
        return "clip"
    # By names first: they need no look at a teacher's checkpoint, which may have moved.
    named = [
        name
        for name in with_summary
        if name.startswith(("siglip", "clip")) or adaptors[name]["teacher"].startswith("open_clip:")
    ]
    found = named or [name for name in with_summary if has_text(adaptors[name]["teacher"])]
    return found[0] if len(found) == 1 else None
