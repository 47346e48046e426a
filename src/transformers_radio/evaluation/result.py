"""A result in a file: what was measured, on what, and how. Tables, model cards and repeated commands read it."""

import hashlib
import json
import math
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers_radio.disk import setting, write_json
from transformers_radio.teachers import TEACHERS

SEPARATORS = " -_/,:@"  # characters between the words in names of models and data
# Words in the protocols of earlier versions, and what they are now.
REWORDED = {"centre": "center", "one box an image": "one box per image", "images a class": "images per class"}
LONGEST = 150  # bytes of a name within a file name; file systems allow 255 for the whole file name


@dataclass
class Result:
    """What one task found for one model.

    Attributes:
        metrics: Name -> value, in percent unless the name says otherwise.
        protocol: The sentence that makes the numbers comparable.
        settings: Everything that the numbers depend on, which summary or features were used among it.
        counts: Numbers of images, classes, skipped images and the like.
        params: Number of weights of the model, without adaptors.
        resolution: A side or [height, width] in pixels.
        kind: "student" or "teacher". `read` fills it in for files of earlier versions, which do not have it.
    """

    task: str
    model: str
    data: str
    metrics: dict[str, float]
    protocol: str
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    params: int | None = None
    resolution: int | list[int] | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.task} of {self.model} gave {name} = {value}, which is not a result.")

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Result":
        """
        Raises:
            ValueError: the file does not hold a result.
        """
        try:
            result = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a result of an evaluation ({error}).") from error
        result.kind = result.kind or result._kind_before()
        for before, now in REWORDED.items():  # one protocol, not two
            result.protocol = result.protocol.replace(before, now)
        return result

    @property
    def spec(self) -> str:
        """Where the model came from, without a title."""
        spec = str(self.settings.get("model", self.model))
        title, _, source = spec.partition("=")
        return (source if title and source else spec).rstrip("/")

    @property
    def choices(self) -> dict[str, str]:
        """Which of the model's outputs were read where there are several: summary, features, a student's adaptor."""
        return {key: self.settings[key] for key in ("summary", "features", "adaptor") if self.settings.get(key)}

    @property
    def seed(self) -> int | None:
        """The seed of what was random; None where nothing was."""
        if self.settings.get("method") == "probe":  # segmentation's; the other methods train nothing
            return setting(self.settings, "probe.seed")
        return self.settings.get("seed")

    def _kind_before(self) -> str:
        """The kind of model in a file of an earlier version, which does not state it."""
        # A vision model of transformers is named without a type, but read as a teacher.
        is_teacher = self.spec.partition(":")[0] in TEACHERS or "teacher's own" in str(self.settings.get("features"))
        return "teacher" if is_teacher else "student"


def result_path(output: Path, model: str, task: str, data: str) -> Path:
    """OUTPUT/<model>/<task>.<data>.json, the names made by `slug`, or as in earlier versions if their file exists.

    Raises:
        ValueError: the file holds the result of a model or data set of another name.
    """
    path = output / slug(model) / f"{task}.{slug(data)}.json"
    before = output / _slug_before(model) / f"{task}.{_slug_before(data)}.json"
    if before != path and not path.exists() and _names(before) == (model, data):
        return before
    there = _names(path)
    if there is not None and there != (model, data):
        raise ValueError(
            f"{path} holds the result of {there[0]!r} on {there[1]!r}, and that of {model!r} on {data!r} would have "
            "its name: choose another --output, another title (TITLE=MODEL), or another name of the data (name=...)."
        )
    return path


def _names(path: Path) -> tuple[str, str] | None:
    """Model and data of the result in this file; None if there is none."""
    try:
        result = Result.read(path)
    except (OSError, ValueError):
        return None
    return re.sub(r"^(\.\./)+", "", result.model), result.data  # ../student, as it once was called


def slug(text: str) -> str:
    """A readable file name: letters and digits of every script, dots, and dashes between words.

    If the text has other characters, its hash is appended, so that names that differ only in these get files of their
    own. Names that differ only in what separates their words ("a b", "a-b", "a/b") get the same file.
    """
    text = unicodedata.normalize("NFC", text)
    kept = [one if one.isalnum() or one == "." or (ord(one) > 127 and one.isprintable()) else "-" for one in text]
    words = re.sub("-+", "-", "".join(kept)).strip("-")
    name = words.strip("-.")
    lost = [sign for one, sign in zip(kept, text, strict=True) if one == "-" and sign not in SEPARATORS]
    if lost or name != words or len(name.encode()) > LONGEST:
        name = f"{_cut(name, LONGEST)}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}".lstrip("-")
    return name or "unnamed"


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of UTF-8, in whole letters."""
    return text.encode()[:size].decode(errors="ignore")


def _slug_before(text: str) -> str:
    """The file name of earlier versions: Latin letters only, so that all names of other scripts shared one file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"
