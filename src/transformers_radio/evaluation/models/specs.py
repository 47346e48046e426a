"""The names of models, TITLE=TYPE:CHECKPOINT@SIZE, in their parts; nothing here loads torch or weights."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers_radio.evaluation.paths import expand_home, path_name
from transformers_radio.modeling import STUDENTS
from transformers_radio.teachers import TEACHERS

HEADS = ("radio_backbone", "radio_vision_tower")  # model_type of the package's other checkpoints with a student inside


@dataclass(frozen=True)
class ModelSpec:
    """A model's name in its parts.

    title: what tables call it.
    type: one of `TEACHERS`, or None where the name is a folder or Hub id alone.
    checkpoint: what comes after TYPE:, without the size.
    image_size: side in pixels, or None.

    `str` gives it back without title and size.
    """

    title: str
    type: str | None
    checkpoint: str
    image_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Splits `text`; without a title it is the last part of the path or name. `~` is the home folder.

        An existing path keeps its `=` and `@`.
        """
        text, image_size = _split_size(expand_home(text))
        title, equals, source = text.partition("=")
        if not (equals and title and source) or os.path.exists(text):
            title, source = "", text
        type, colon, checkpoint = source.partition(":")
        if not colon or type not in TEACHERS:
            return cls(title or _title(source), None, source, image_size)
        return cls(title or _title(checkpoint), type, checkpoint, image_size)

    def __str__(self) -> str:
        return self.checkpoint if self.type is None else f"{self.type}:{self.checkpoint}"

    @cached_property
    def kind(self) -> str:
        """A type of `TEACHERS`, or "student"; where the name has no type, the checkpoint's config.json tells.

        Raises:
            FileNotFoundError: there is no such folder, nor a model of this name on the Hub.
            ValueError: an unknown type, or a folder without config.json.
        """
        if self.type is not None:
            return self.type
        if ":" in self.checkpoint and not Path(self.checkpoint).exists():
            raise ValueError(self._unknown_type())
        return "student" if _model_type(self.checkpoint) in (*STUDENTS, *HEADS) else "transformers"

    @property
    def is_student(self) -> bool:
        """Whether it is a student; raises as `kind` does."""
        return self.kind == "student"

    def _unknown_type(self) -> str:
        return f"{str(self)!r} begins with no type of model: use one of {', '.join(TEACHERS)}, or a folder."


def check_model(text: str) -> None:
    """Looks for what `encoder.load_encoder` would load, in a moment: before torch is loaded, and without the weights.

    Raises:
        FileNotFoundError: there is no such folder or file, nor a model of this name on the Hub.
        ValueError: an unknown type.
    """
    spec = ModelSpec.parse(text)
    if any(os.path.exists(path) for path in (expand_home(text), str(spec))):
        return
    if spec.type is not None:
        if spec.checkpoint.startswith(("/", "./", "../", "~")) and not os.path.exists(spec.checkpoint):
            raise FileNotFoundError(f"There is no {spec.checkpoint}, which {text} names. Check the path.")
        return
    if ":" in spec.checkpoint:
        raise ValueError(spec._unknown_type())
    from huggingface_hub import hf_hub_download

    with folder_or_hub(spec.checkpoint):
        hf_hub_download(spec.checkpoint, "config.json")


@contextlib.contextmanager
def folder_or_hub(name: str) -> Iterator[None]:
    """Goes around what opens `name`, a folder or a name on the Hub. What is not a folder may be a mistyped path, so an
    error must say both.

    Raises:
        FileNotFoundError: instead of whatever the Hub's libraries raise, where there is no such path.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if os.path.exists(name) or "://" in name:
            raise
        first: BaseException = error
        while first.__cause__ is not None:  # the Hub's libraries wrap what happened several times
            first = first.__cause__
        reason = (str(first).splitlines() or [type(first).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            f"There is no folder {name}, and the Hub does not give one of this name: {reason}. Check the path, or the "
            "connection."
        ) from None


def _split_size(text: str) -> tuple[str, int | None]:
    """("text", 224) of "text@224"; a folder or file of that name has no size."""
    source, at, size = text.rpartition("@")
    if not at or not size.isdecimal() or Path(text.partition("=")[2] or text).exists():
        return text, None
    return source, int(size)


def _title(checkpoint: str) -> str:
    path = Path(checkpoint)
    if path.is_file():
        path = path.with_suffix("")
    parts = [part for part in path.parts[-2:] if part != ".."]
    # runs/mine/student is "mine/student": the folder that a run leaves is always called so
    return "/".join(parts) if path.name in ("student", "checkpoint") else path_name(path)


def _model_type(checkpoint: str) -> str | None:
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{checkpoint} has no config.json, so it is no transformers model: name a type, such as "
                f"open_clip:{checkpoint}."
            )
        return _type_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    from transformers import PretrainedConfig

    with folder_or_hub(checkpoint):
        return _type_of(PretrainedConfig.get_config_dict(checkpoint)[0])


def _type_of(config: dict) -> str | None:
    """The `model_type`; a config of NVIDIA's own code has `args` and may have no type."""
    return config.get("model_type") or ("radio" if "args" in config else None)
