"""What the stages of a run share, and where the run is."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher
from transformers_radio.training.cache import TeacherCaches
from transformers_radio.training.groups import Group
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.student import TeacherShape

from .folder import STATE, checkpoint_folder


@dataclass
class TrainingState:
    """Where a run is: state.json of a checkpoint, the same on every process.

    Attributes:
        step: optimizer steps so far, over all stages.
        stage: name of the last step's stage; None before the first step.
        streams: group -> its position in the data, of all processes together.
        statistics: teacher -> [bytes, checksum] of the PHI-S statistics that the run was trained with; None in
            checkpoints of older versions, which did not record them.
        schedule: of the learning rate, in that stage.
        processes: how many there were.
    """

    step: int = 0
    stage: str | None = None
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    statistics: dict[str, list[int]] | None = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainingState":
        """The state that `write` left in a checkpoint's folder."""
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return cls(**{"statistics": None, **values})

    def write(self, checkpoint: Path) -> None:
        (checkpoint / STATE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def skipped_images(self) -> dict[str, int]:
        """Images that all processes have left out since the start, by reason."""
        lanes = [lane for stream in self.streams.values() for lane in stream["lanes"].values()]
        return dict(sum((Counter(lane["skipped"]) for lane in lanes), Counter()))


@dataclass
class Run:
    """One run of a recipe, as one process sees it: what all stages share.

    Attributes:
        student: with the heads of all stages, on the CPU. Each stage trains its part of these weights.
        teachers: those that this process serves in the stages to come.
        shapes: of all teachers.
        groups: stage -> its groups, also those that other processes serve.
        caches: of the teachers' outputs; None when the recipe has none.
        state: where the run is.
        progress: the bar over all steps.
    """

    recipe: Recipe
    accelerator: Accelerator
    student: RadioModel
    teachers: dict[str, Teacher]
    shapes: dict[str, TeacherShape]
    groups: dict[str, list[Group]]
    caches: TeacherCaches | None
    state: TrainingState
    progress: tqdm = field(init=False)

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of the current step; None before the first step."""
        return checkpoint_folder(self.output_dir, self.state.step) if self.state.step else None

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages.values())

    def last_step(self, stage_name: str) -> int:
        """The step after which a stage ends, counted over all stages."""
        return sum(self.recipe.stages[name].steps for name in self._stages_until(stage_name))

    def groups_until(self, stage_name: str) -> list[Group]:
        """The groups of a stage and of all stages before it, whose heads the student keeps."""
        return [group for name in self._stages_until(stage_name) for group in self.groups[name]]

    def release_teachers(self, stage_name: str) -> None:
        """Frees the memory of the teachers that neither this stage nor a later one needs."""
        names = list(self.recipe.stages)
        to_come = [group for name in names[names.index(stage_name) :] for group in self.groups[name]]
        for name in self.teachers.keys() - {name for group in to_come for name in group.teachers}:
            del self.teachers[name]

    def _stages_until(self, stage_name: str) -> list[str]:
        names = list(self.recipe.stages)
        return names[: names.index(stage_name) + 1]
