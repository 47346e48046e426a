"""One measured figure set in a file: what was measured, on what, how. Tables, cards and repeated calls read these."""

import json
import math
import os
import re
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
                dataset_type=re.sub(r"[^a-z0-9]+", "-", self.data.lower()).strip("-"),
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
    """OUTPUT/<model>/<task>.<data>.json"""
    return output / slug(model) / f"{task}.{slug(data)}.json"


def work_folder(output: Path, model: str, task: str, data: str) -> Path:
    """OUTPUT/<model>/<task>.<data>/, for caches and unfinished work."""
    return output / slug(model) / f"{task}.{slug(data)}"


def done(path: Path, settings: dict[str, Any], overwrite: bool) -> Result | None:
    """The result in this file, where it was measured with the same settings; None where there is none yet.

    Raises:
        ValueError: a result of other settings is there, and `overwrite` is False.
    """
    if overwrite or not path.exists():
        return None
    result = Result.read(path)
    here = json.loads(json.dumps(settings))  # as JSON gives it back: no tuples
    changed = [
        f"{key} ({result.settings.get(key)!r} there, {value!r} here)"
        for key, value in here.items()
        if result.settings.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{path} holds a result of other settings; it differs in {', '.join(changed)}. Choose another --output, "
            "or replace it with overwrite=true."
        )
    return result


def slug(text: str) -> str:
    """A file name that can be read: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"
