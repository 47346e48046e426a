"""What every task of `transformers-radio eval` has in common, and its way from settings to result files.

A new task is a folder with a subclass of `Task`, and one line in `run.TASKS`; docs/extending.md has an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from transformers_radio.disk import differences, remove

from .models.encoder import VisionEncoder
from .result import Result, result_path
from .workspace import work_folder


@dataclass
class Job:
    """A loaded model, and everything about its result that is known before it is measured.

    Attributes:
        model, data: What results call the model and the data.
        kind: "student" or "teacher".
        encoder: The model, for `Task.measure`.
        settings: Everything that the numbers depend on; `Task.counted` names those that a result is known by.
        params: Number of weights of the model, without adaptors.
        resolution: A side or [height, width] in pixels.
    """

    model: str
    data: str
    kind: str
    encoder: Any
    settings: dict[str, Any]
    params: int
    resolution: int | list[int]

    @classmethod
    def of(
        cls, encoder: VisionEncoder, data: str, settings: dict[str, Any], resolution: int | list[int] | None = None
    ) -> "Job":
        """With name, kind and number of weights from the encoder; its own resolution unless given."""
        kind = "student" if encoder.is_student else "teacher"
        resolution = encoder.image_size if resolution is None else resolution
        return cls(encoder.name, data, kind, encoder, settings, encoder.params, resolution)


@dataclass
class Measured:
    """What `Task.measure` returns.

    Attributes:
        metrics: Name -> value, in percent unless the name says otherwise.
        protocol: The sentence that makes the numbers comparable.
        counts: Numbers of images, classes, skipped images and the like.
        findings: Further values that belong to the result's settings and are not numbers of a table, such as sizes
            that were left out and why.
    """

    metrics: dict[str, float]
    protocol: str
    counts: dict[str, int]
    findings: dict[str, Any] = field(default_factory=dict)


class Task:
    """One task with its settings. Subclasses declare the attributes and write `open` and `measure`.

    Attributes:
        name: What the command line and result files call it.
        config_class: The dataclass of its settings, every field with a help text. It has `overwrite`.
        counted: Names of the settings that a result is known by ("bank.files" is `files` in the dictionary `bank`).
            A finished result with the same values is not measured again, whatever the other settings are.
        method: Which of several ways to measure; it is part of the result's file name. `open` may set it.
        several_processes: Whether the processes of `accelerate launch` share the work; if not, one process is allowed.
        measured_together: Whether all models are measured again if one of them has no result yet.
        keeps_work: Whether the work folder stays when the result is written.
        passed_over: Settings of another task that a recipe for both may hold. As overrides they are errors.
        columns: Metrics that have a column in the report; ("*",) for all.
        without_column: Endings of metrics that have none all the same.
        column_is_data: Whether the column is called by the data instead of by the metric.
        units: Unit of metrics that are not percentages, "" for numbers without one.
        lower_is_better: Metrics of which the smallest value is the best.
        hub_task: Type and name of the task in a model card of the Hub; None if the Hub has no such task.
        hub_metrics: Metric, or the last word of its name -> its type in a model card; others are "accuracy".
    """

    name: str
    config_class: type
    counted: tuple[str, ...]
    method: str = ""
    several_processes: bool = False
    measured_together: bool = False
    keeps_work: bool = True
    passed_over: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    without_column: tuple[str, ...] = ()
    column_is_data: bool = False
    units: Mapping[str, str] = {}
    lower_is_better: tuple[str, ...] = ()
    hub_task: tuple[str, str] | None = None
    hub_metrics: Mapping[str, str] = {}

    def __init__(self, config: Any, output: Path):
        self.config = config
        self.output = output

    @classmethod
    def has_column(cls, metric: str) -> bool:
        """Whether this metric is a column of the report."""
        return (metric in cls.columns or cls.columns == ("*",)) and not metric.endswith(cls.without_column)

    def open(self, models: list[str]) -> list[Job]:
        """Check the settings, open the data and load the models: whatever can be wrong is said here.

        Args:
            models: see `models.encoder.load_encoder`; their names are different.
        """
        raise NotImplementedError

    def measure(self, job: Job, folder: Path) -> Measured:
        """Measure one model. Work that a killed run may continue belongs into `folder`, which may not exist yet."""
        raise NotImplementedError

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings from a file of an earlier version, in today's form."""
        return settings

    def finish(self, results: list[Result]) -> None:
        """Called at the end with the results of all models, in their order."""

    def run(self, models: list[str]) -> list[Result]:
        """Measure the models whose results are not there yet; one `Result` per model, in their order."""
        jobs = self.open(models)
        name = f"{self.name}-{self.method}" if self.method else self.name
        paths = [result_path(self.output, job.model, name, job.data) for job in jobs]
        found = [self._finished(job, path) for job, path in zip(jobs, paths, strict=True)]
        if self.measured_together and None in found:
            found = [None] * len(jobs)
        results = [
            self._write(job, path) if result is None else result
            for job, path, result in zip(jobs, paths, found, strict=True)
        ]
        self.finish(results)
        return results

    def _finished(self, job: Job, path: Path) -> Result | None:
        """The result in this file if everything that counts is the same; None if there is none yet.

        Raises:
            ValueError: the file holds another result, and `overwrite` is not set.
        """
        if self.config.overwrite or not path.exists():
            return None
        result = Result.read(path)
        there, here = self.recognized(result.settings), job.settings
        if not (there.get("adaptor") and here.get("adaptor")):  # unknown, as its teacher could not be asked
            there, here = {**there, "adaptor": None}, {**here, "adaptor": None}
        changed = differences(there, here, self.counted)
        if changed:
            raise ValueError(
                f"{path} holds a result of other settings; it differs in {', '.join(changed)}. Choose another "
                "--output, or replace it with overwrite=true."
            )
        return result

    def _write(self, job: Job, path: Path) -> Result:
        folder = work_folder(path)
        measured = self.measure(job, folder)
        result = Result(
            task=self.name,
            model=job.model,
            data=job.data,
            metrics=measured.metrics,
            protocol=measured.protocol,
            settings={**job.settings, **measured.findings},
            counts=measured.counts,
            params=job.params,
            resolution=job.resolution,
            kind=job.kind,
        )
        if PartialState().is_main_process:
            result.write(path)
            if not self.keeps_work:
                remove(folder)
        return result
