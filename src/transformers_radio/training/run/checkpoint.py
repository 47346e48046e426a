"""Checkpoints that survive kill -9: written under a temporary name, renamed when whole, the last few kept.

output_dir/checkpoints/step-00001000/
  config.json, model.safetensors, *.py      a Hugging Face folder that AutoModel loads, as the student is published
  training_state/                           for DDP, FSDP2 and one process: each resumes what another has written
    model.safetensors                       what is trained, as it is trained
    optimizer.pt, scaler.pt, ema.safetensors
    random_<rank>.pt                        random generators
    state.json                              step, stage, schedule, data positions
    teacher_manifest.json                   which teachers taught: type, checkpoint, hash of the weights, dtype, size
  manifest.json                             bytes and checksum of every file
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from transformers_radio.data import merge_states
from transformers_radio.disk import differences, remove, temporary_path, writing
from transformers_radio.teachers import portable_checkpoint
from transformers_radio.teachers.checkpoints import read_file
from transformers_radio.training.phi_s.rotation import PhiS
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.stability.ema import EMA
from transformers_radio.training.student import TeacherShape

from .export import WHOLE_ON_MAIN, whole_state, write_student
from .folder import MANIFEST, checkpoint_folder, find_checkpoints, size_and_checksum
from .processes import on_main_process
from .state import Run

TEACHERS = "teacher_manifest.json"


KEPT = "the last good one is kept; "


def save_checkpoint(
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    transforms: dict[str, PhiS],
    streams: dict[str, dict[str, Any]],
) -> None:
    """Writes the checkpoint of the run's step, on all processes together; older ones are deleted.

    Args:
        run: its state gets the positions of all processes in the data.
        model: the prepared `Distillation`.
        transforms: teacher -> PHI-S of its features; the inverse is folded into the student's heads.
        streams: group -> this process's ImageStream.state_dict(), for the groups that it serves.

    Raises:
        OSError: on every process, when it could not be written on one; nothing is left of it.
    """
    accelerator, state = run.accelerator, run.state
    path = checkpoint_folder(run.output_dir, state.step)
    temporary = temporary_path(path)
    folder = temporary / "training_state"
    state.streams |= _merge_positions(streams)
    state.processes = accelerator.num_processes

    # Sharded weights are gathered by all processes; only the main one has the result.
    model_state = whole_state(model)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_MAIN)
    averages = None if ema is None else ema.state_dict(keep=accelerator.is_main_process)
    error = None
    try:
        with writing(path, KEPT, also=(SafetensorError,)):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(_random_state(accelerator), folder / f"random_{accelerator.process_index}.pt")
            if accelerator.is_main_process:
                save_file(model_state, folder / "model.safetensors")
                torch.save(optimizer_state, folder / "optimizer.pt")
                if accelerator.scaler is not None:
                    torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
                if averages is not None:
                    save_file(averages, folder / "ema.safetensors")
                student = accelerator.unwrap_model(model).student
                write_student(student, model_state, averages, transforms, temporary)
                state.write(temporary)
                teachers = describe_teachers(run.recipe, run.shapes)
                (folder / TEACHERS).write_text(json.dumps(teachers, indent=1), encoding="utf-8")
    except OSError as failure:
        error = str(failure)
    errors = [one for one in gather_object([error]) if one is not None]
    on_main_process(accelerator, lambda: _finish(temporary, path, errors, run.recipe.checkpoints.keep))


def _merge_positions(streams: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group -> the positions of all its processes, as one."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for group, position in gather_object(list(streams.items())):
        by_group.setdefault(group, []).append(position)
    return {group: merge_states(positions) for group, positions in by_group.items()}


def _finish(temporary: Path, path: Path, errors: list[str], keep: int) -> None:
    """Puts a checkpoint that all processes have written in its place, and deletes all but the last `keep`."""
    try:
        if errors:
            raise OSError(errors[0])
        with writing(path, KEPT):
            _write_manifest(temporary)
            os.replace(temporary, path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in find_checkpoints(path.parent.parent)[:-keep]:
        doomed = temporary_path(old)  # so that a kill half-way leaves no broken checkpoint
        os.replace(old, doomed)
        remove(doomed)


def describe_teachers(recipe: Recipe, shapes: dict[str, TeacherShape]) -> dict[str, dict[str, Any]]:
    """Teacher -> what decides its targets. For JSON, and without this machine's folders."""
    return {
        name: {
            "type": spec.type,
            "checkpoint": portable_checkpoint(spec.checkpoint),
            "weights": shapes[name].weights,
            "dtype": spec.dtype,
            "image_size": shapes[name].image_size,
        }
        for name, spec in recipe.teachers.items()
        if name in shapes
    }


def check_teachers(checkpoint: Path, teachers: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError if a run would resume with other teachers than it had, such as a newer revision of one."""
    path = checkpoint / "training_state" / TEACHERS
    if not path.exists():  # older versions wrote none
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in before.keys() & teachers.keys():
        changed = differences(before[name], teachers[name], ("weights", "dtype", "image_size"))
        if changed:
            raise ValueError(
                f"teachers.{name} is not the one that taught until {checkpoint}; it differs in {', '.join(changed)}: "
                "bring its weights back, or choose another output_dir"
            )


def load_weights(checkpoint: Path, model: torch.nn.Module, same_stage: bool) -> None:
    """Loads a checkpoint's weights into the `Distillation`, before it is prepared.

    Args:
        same_stage: False when an earlier stage has written them, whose student may have fewer heads.

    Raises:
        ValueError: they belong to another model.
    """
    saved = load_file(checkpoint / "training_state" / "model.safetensors")
    if not same_stage:  # each stage has its own terms, whose number decides the shapes of the balancing
        saved = {name: value for name, value in saved.items() if not name.startswith("balancing.")}
    missing, unexpected = model.load_state_dict(saved, strict=False)
    if not same_stage:
        missing = [name for name in missing if not name.startswith(("student.adaptors.", "balancing."))]
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint} belongs to another model: it lacks {missing[:3]} and has {unexpected[:3]} in addition; "
            "restore the recipe that wrote it, or choose another output_dir"
        )


def load_training(run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
    """What a stage resumes with besides the weights, once the model is prepared: moments, averages, random numbers.

    A process that the run did not have before gets random numbers of its own.
    """
    accelerator, checkpoint = run.accelerator, run.checkpoint
    assert checkpoint is not None
    folder = checkpoint / "training_state"
    saved = read_file(folder / "optimizer.pt")
    for group in saved["param_groups"]:
        group.pop("trunk", None)  # earlier versions had groups of their own for the trunk's weights
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(read_file(folder / "scaler.pt"))
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema.safetensors"))
    random_file = folder / f"random_{accelerator.process_index}.pt"
    if random_file.exists():
        _set_random_state(accelerator, read_file(random_file))
    else:
        set_seed(run.recipe.seed + run.state.step, device_specific=True)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): size_and_checksum(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _random_state(accelerator: Accelerator) -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [np.asarray(keys).tolist(), *rest]}
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return state


def _set_random_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    if accelerator.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)
