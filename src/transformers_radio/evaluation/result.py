"""One measured figure set in a file: what was measured, on what, how. Tables, cards and repeated calls read these."""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What a Hub model card calls the task.
HUB_TASKS = {
    "knn": ("image-classification", "k-NN classification"),
    "zero-shot": ("zero-shot-image-classification", "Zero-shot classification"),
    "segmentation": ("image-segmentation", "Semantic segmentation"),
    "sam-coco": ("mask-generation", "Prompted masks"),
    "llava": ("visual-question-answering", "Visual question answering with LLaVA-1.5"),
}
# And the type of a metric, by its name or its last word; accuracy otherwise.
HUB_METRICS = {
    "mIoU": "mean_iou",
    "mAcc": "mean_accuracy",
    "SAM COCO": "mean_iou",
    **{f"mask AP{part}": "mean_average_precision" for part in ("", "50", "75", "_small", "_medium", "_large")},
    "F1": "f1",
    "precision": "precision",
    "recall": "recall",
    "yes": "yes_ratio",
}

SEPARATORS = " -_/,:@"  # what parts words in the names of models and data
LONGEST = 150  # bytes of a name within a file name; file systems take 255 for the whole


@dataclass
class Result:
    """One task for one model.

    metrics: name -> value; percent unless the name says otherwise.
    protocol: the sentence that makes the numbers comparable.
    settings: all that the numbers depend on, and which summary or features were used.
    counts: images, classes, skipped images and the like.
    params: weights of the model, without adaptors. resolution: a side or [height, width] in pixels.
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

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.task} of {self.model} gave {name} = {value}, which is no result.")

    def write(self, path: Path) -> "Result":
        """Written whole: a reader never meets half a file. Returns itself."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return self

    @classmethod
    def read(cls, path: Path) -> "Result":
        """
        Raises:
            ValueError: the file is no result.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of an evaluation ({error}).") from error

    @property
    def choices(self) -> dict[str, str]:
        """Which of the model's outputs there were to read: its summary, its features, and a student's adaptor."""
        return {key: self.settings[key] for key in ("summary", "features", "adaptor") if self.settings.get(key)}

    @property
    def seed(self) -> int | None:
        """Of what was random; None where nothing was."""
        if self.settings.get("method") == "probe":  # segmentation's; by words nothing is trained
            return self.settings["probe"]["seed"]
        return self.settings.get("seed")

    def eval_results(self) -> list:
        """The metrics as `huggingface_hub.EvalResult`s, for the metadata of a model card; none for speed and such."""
        from huggingface_hub import EvalResult

        if self.task not in HUB_TASKS:
            return []
        task_type, task_name = HUB_TASKS[self.task]
        resolution = self.resolution
        arguments = {"protocol": self.protocol, **self.choices, "resolution": resolution, "seed": self.seed}
        return [
            EvalResult(
                task_type=task_type,
                task_name=task_name,
                dataset_type=re.sub(r"[\W_]+", "-", self.data.lower()).strip("-") or "unnamed",
                dataset_name=self.data,
                metric_type=HUB_METRICS.get(name) or HUB_METRICS.get(name.split()[-1], "accuracy"),
                metric_name=name,
                metric_value=value,
                metric_config=None if resolution is None else f"{resolution} px",
                metric_args={key: value for key, value in arguments.items() if value is not None} | self.counts,
            )
            for name, value in self.metrics.items()
            if value >= 0  # COCO has -1 where there is no object of a size
        ]


def result_path(output: Path, model: str, task: str, data: str) -> Path:
    """OUTPUT/<model>/<task>.<data>.json, the names as `slug` has them, or as earlier versions had where a result of
    theirs is there.

    Raises:
        ValueError: the file of a model or data set of another name is there.
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


def work_folder(path: Path) -> Path:
    """For caches and unfinished work, beside the result at `path`: OUTPUT/<model>/<task>.<data>/"""
    return path.with_name(path.name.removesuffix(".json"))


def _names(path: Path) -> tuple[str, str] | None:
    """Model and data of the result in this file; None where there is none."""
    try:
        result = Result.read(path)
    except (OSError, ValueError):
        return None
    return re.sub(r"^(\.\./)+", "", result.model), result.data  # ../student, as it once was called


def done(
    path: Path,
    settings: dict[str, Any],
    counted: Sequence[str],
    overwrite: bool,
    before: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Result | None:
    """The result in this file, where all that counts is the same; None where there is none yet.

    Args:
        settings: of the result that is wanted.
        counted: which of them a result is known by; "bank.files" is `files` in the dictionary `bank`.
        before: from the settings in a file of an earlier version to those that today's would have.

    Raises:
        ValueError: another result is there, and `overwrite` is False.
    """
    if overwrite or not path.exists():
        return None
    result = Result.read(path)
    changed = differences(result.settings if before is None else before(result.settings), settings, counted)
    if changed:
        raise ValueError(
            f"{path} holds a result of other settings; it differs in {', '.join(changed)}. Choose another --output, "
            "or replace it with overwrite=true."
        )
    return result


def differences(there: dict[str, Any], here: dict[str, Any], counted: Sequence[str]) -> list[str]:
    """Such as "k (20 there, 10 here)", for those of the settings `counted` that differ."""
    here = json.loads(json.dumps(here))  # as a file gives it back: no tuples
    pairs = {name: (setting(there, name), setting(here, name)) for name in counted}
    return [f"{name} ({one!r} there, {other!r} here)" for name, (one, other) in pairs.items() if one != other]


def setting(settings: Any, name: str) -> Any:
    """The value at "outer.inner", None where it is not there."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def slug(text: str) -> str:
    """A file name that can be read: letters and digits of every script, dots, and dashes between words.

    A text that has other signs gets a hash of it, so that names that differ in these have files of their own. Names
    that differ only in how words are parted ("a b", "a-b", "a/b") have one.
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
    """As in earlier versions: of Latin letters alone, so that names of other scripts had one file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"
