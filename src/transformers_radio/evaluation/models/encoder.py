"""Any frozen vision model behind what evaluation asks of it: a summary, patch features, and words if it has them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import RadioModel as NativeRadioModel

from transformers_radio.evaluation.paths import expand_home
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.precision import DTYPES
from transformers_radio.teachers import TEACHERS, Teacher, build_teacher, digest_weights

from .specs import folder_or_hub, split_size, split_title

TEXT_TOWERS = ("open_clip", "transformers")  # teachers whose text towers can be loaded alone
Features = tuple[torch.Tensor, tuple[int, int]]
# Of `VisionEncoder.settings`, what results are known by: all but where the model lies.
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
    """One model, frozen and in eval mode, at one default resolution.

    Every method takes float RGB images in [0, 1], (B, 3, H, W), on the encoder's device, and returns float32. A
    student takes sides that are multiples of `step`; a teacher only squares of its `image_size`.

    Attributes:
        name: what tables call it.
        spec: where it was loaded from, see `load_encoder`.
        model: the `RadioModel` or `Teacher`.
        image_size: default side in pixels.
        step: sides must be multiples of it.
        params: number of weights; without a student's adaptors, which belong to the teachers.
        adaptor: the student's adaptor that `language` reads, or None.
        choices: which summary and features these are, for reports.
    """

    def __init__(self, name: str, spec: str, model: nn.Module, image_size: int, step: int, adaptor: str | None):
        super().__init__()
        self.name = name
        self.spec = spec
        self.model: Any = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.step = step
        self.adaptor = adaptor
        self.params = count_parameters(model) - count_parameters(getattr(model, "adaptors", None))
        self.choices = self._choices()

    @property
    def is_student(self) -> bool:
        return not isinstance(self.model, Teacher)

    @torch.no_grad()
    def summary(self, images: torch.Tensor) -> torch.Tensor:
        """What k-NN compares, (B, D): a student's backbone summary, a teacher's, or the mean of its features."""
        if self.is_student:
            return self.model(self._cast(images), adaptors=[]).summary.float()
        output = self.model(images)
        return output.features.mean(dim=1) if output.summary is None else output.summary

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """Patch features (B, h*w, C), row-major, and the grid (h, w)."""
        if not self.is_student:
            output = self.model(images)
            return output.features, output.grid
        features = self.model(self._cast(images), adaptors=[]).features.float()
        rows, columns = (side // self.model.patch_size for side in images.shape[2:])
        return features, (rows, columns)

    @torch.no_grad()
    def language(self, images: torch.Tensor) -> torch.Tensor:
        """Summaries in the space of `text_tower`, (B, D).

        Raises:
            ValueError: the model speaks no text tower's language.
        """
        if not self.is_student:
            self.text_tower()
            return self.model(images).summary
        self._require_adaptor()
        return self.model(self._cast(images), adaptors=[self.adaptor]).adaptors[self.adaptor].summary.float()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> "Encoded":
        """All of these from one forward pass; `language` is None for a model that speaks no text tower's."""
        if self.is_student:
            output = self.model(self._cast(images), adaptors=[] if self.adaptor is None else [self.adaptor])
            rows, columns = (side // self.model.patch_size for side in images.shape[2:])
            words = None if self.adaptor is None else output.adaptors[self.adaptor].summary.float()
            return Encoded(output.summary.float(), output.features.float(), (rows, columns), words)
        output = self.model(images)
        summary = output.features.mean(dim=1) if output.summary is None else output.summary
        return Encoded(summary, output.features, output.grid, output.summary if self.has_words else None)

    @property
    def has_words(self) -> bool:
        """Whether `language` has a text tower."""
        try:
            self.text_tower()
        except ValueError:
            return False
        return True

    def text_tower(self) -> str:
        """TYPE:CHECKPOINT of the text tower that shares the space of `language`.

        Raises:
            ValueError: there is none.
        """
        if self.is_student:
            self._require_adaptor()
            teacher = self.model.config.adaptors[self.adaptor]["teacher"]
            if not teacher.startswith(tuple(f"{tower}:" for tower in TEXT_TOWERS)):
                raise ValueError(
                    f"The adaptor {self.adaptor!r} of {self.spec} does not say whose text tower it speaks (its "
                    f"teacher is {teacher!r}): give it with text=TYPE:CHECKPOINT, such as open_clip:ViT-H-14:dfn5b."
                )
            return teacher
        kind, checkpoint = split_spec(self.spec)
        speaks = kind in TEXT_TOWERS
        if kind == "transformers":
            speaks = self.model.model.config.model_type.startswith(("clip", "siglip"))
        if not speaks:
            raise ValueError(f"{self.spec} has no text tower, so it cannot be asked in words.")
        return f"{kind}:{checkpoint}"

    def settings(self) -> dict[str, Any]:
        """Where the model came from, and what results depend on (`ENCODER_COUNTED`): its weights, its dtype and which
        outputs are read."""
        dtype = self.model.dtype
        return {
            "model": self.spec,
            "weights": digest_weights(self.model),
            "dtype": str(dtype).removeprefix("torch."),
            **self.choices,
            **({} if self.adaptor is None else {"adaptor": self.adaptor}),
        }

    def check_size(self, height: int, width: int) -> None:
        """ValueError with the nearest sizes that fit, unless images of this size can be encoded."""
        if not self.is_student and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} was built for {self.image_size} x {self.image_size} pixels and cannot take {height} x "
                f"{width}: load it with another image_size, and square."
            )
        if height % self.step or width % self.step or min(height, width) < self.step:
            nearest = [max(1, round(side / self.step)) * self.step for side in (height, width)]
            raise ValueError(
                f"{self.name} takes sides that are multiples of {self.step}, not {height} x {width}: use "
                f"{nearest[0]} x {nearest[1]}."
            )

    def _require_adaptor(self) -> None:
        if self.adaptor is None:
            known = ", ".join(self.model.config.adaptors) or "no adaptors"
            raise ValueError(
                f"{self.spec} has no adaptor to a teacher with a text tower (it has {known}): name one with "
                "adaptor=..., or distil a student with a CLIP or SigLIP teacher."
            )

    def _cast(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.model.dtype)

    def _choices(self) -> dict[str, str]:
        if self.is_student:
            config = self.model.config
            windows = f", windows of {config.window_size} patches" if config.window_size else ""
            if config.summary_type == "mean":
                summary = f"mean of the patch tokens, {config.summary_dim} wide"
            else:
                summary = f"class tokens {config.summary_idxs} of the backbone, {config.summary_dim} wide"
            return {"summary": summary, "features": f"last patch tokens, {config.hidden_size} wide{windows}"}
        summary_dim, feature_dim = self.model.summary_dim, self.model.feature_dim
        summary = "mean of the features (it has no summary)" if summary_dim is None else "the teacher's own summary"
        return {
            "summary": f"{summary}, {feature_dim if summary_dim is None else summary_dim} wide",
            "features": f"the teacher's own patch features, {feature_dim} wide",
        }


def load_encoder(
    spec: str,
    image_size: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    adaptor: str | None = None,
    window_size: int | None = None,
) -> VisionEncoder:
    """Load a model to evaluate.

    Args:
        spec: a folder or Hub id (a student, a native transformers RADIO, or any vision model of transformers that is
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
    title, source = split_title(expand_home(spec))
    kind, checkpoint = split_spec(source)
    image_size = split_size(spec)[1] if image_size is None else image_size
    if kind == "student":
        student = load_student(checkpoint, dtype)
        if window_size is not None:
            student.config.window_size = window_size  # its step and what `choices` says follow
        adaptor = _language_adaptor(student, adaptor, spec)
        side = student.preferred_resolution if image_size is None else image_size
        encoder = VisionEncoder(title, source, student, side, student.min_resolution_step, adaptor)
        encoder.check_size(side, side)
    else:
        if adaptor is not None:
            raise ValueError(f"{spec} is no student, so it has no adaptor {adaptor!r}: leave adaptor out.")
        teacher = build_teacher(kind, checkpoint, image_size, dtype)
        encoder = VisionEncoder(title, source, teacher, teacher.image_size, teacher.patch_size, None)
    return encoder.to(device)


def load_student(checkpoint: str, dtype: str = "float32") -> RadioModel:
    """A student of ours, or a RADIO of transformers' own class, whose file may have NVIDIA's layout."""
    if "adaptors" in RadioConfig.get_config_dict(checkpoint)[0]:
        return RadioModel.from_pretrained(checkpoint, dtype=DTYPES[dtype])
    native = NativeRadioModel.from_pretrained(checkpoint, dtype=DTYPES[dtype])
    student = RadioModel(RadioConfig.from_dict(native.config.to_dict())).to(DTYPES[dtype])
    student.load_state_dict(native.state_dict())
    return student


def split_spec(spec: str) -> tuple[str, str]:
    """(type, checkpoint), the type being "student" or one of the teachers'."""
    kind, colon, checkpoint = spec.partition(":")
    if colon and kind in TEACHERS:
        return kind, checkpoint
    if colon and not Path(spec).exists():
        raise ValueError(f"{spec!r} begins with no type of model: use one of {', '.join(TEACHERS)}, or a folder.")
    return ("student" if _model_type(spec) == "radio" else "transformers"), spec


def _model_type(checkpoint: str) -> str | None:
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{checkpoint} has no config.json, so it is no transformers model: name a type, such as "
                f"open_clip:{checkpoint}."
            )
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    from transformers import PretrainedConfig

    with folder_or_hub(checkpoint):
        return PretrainedConfig.get_config_dict(checkpoint)[0].get("model_type")


def _language_adaptor(student: RadioModel, adaptor: str | None, spec: str) -> str | None:
    adaptors = student.config.adaptors
    if adaptor is not None:
        if adaptor not in adaptors or adaptors[adaptor]["summary_dim"] is None:
            speaking = [name for name, one in adaptors.items() if one["summary_dim"] is not None]
            raise ValueError(
                f"{spec} has no adaptor {adaptor!r} with a summary; it has {', '.join(speaking) or 'none'}."
            )
        return adaptor
    if "clip" in adaptors:
        return "clip"
    speaking = [
        name
        for name, one in adaptors.items()
        if one["summary_dim"] is not None and (name.startswith(("siglip", "clip")) or "open_clip:" in one["teacher"])
    ]
    return speaking[0] if len(speaking) == 1 else None


def count_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
