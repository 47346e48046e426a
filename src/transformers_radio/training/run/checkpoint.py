"""Checkpoints that survive kill -9: written under a temporary name, renamed when whole, the last few kept.

output_dir/checkpoints/step-00001000/
  config.json, model.safetensors, *.py      a Hugging Face folder that AutoModel loads, as the student is published
  training_state/                           for DDP, FSDP2 and one process alike: each goes on from the others
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
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from transformers_radio.data import merge_states
from transformers_radio.teachers import portable_checkpoint
from transformers_radio.training.phi_s.rotation import PhiS
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.stability.ema import EMA
from transformers_radio.training.student import TeacherShape

from .export import WHOLE_ON_MAIN, whole_state, write_student
from .folder import MANIFEST, STATE, find_checkpoints, size_and_checksum, writing
from .processes import on_main_process

TEACHERS = "teacher_manifest.json"


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    standardize: dict[str, PhiS],
    output_dir: Path,
    keep: int,
    state: dict[str, Any],
    streams: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes the checkpoint of state["step"], on all processes together.

    Args:
        model: the prepared `Distillation`.
        state: JSON-able, the same on every process; "teachers" is what `describe_teachers` returned.
        streams: group -> this process's ImageStream.state_dict(), of the groups that it serves.

    Returns:
        The state with the data positions of all processes, as `read_state` will return it (but for "teachers").

    Raises:
        OSError: on every process, when it could not be written on one; nothing is left of it.
    """
    path = output_dir / "checkpoints" / f"step-{state['step']:08d}"
    temporary = path.with_name(path.name + ".tmp")
    folder = temporary / "training_state"
    by_group: dict[str, list[dict[str, Any]]] = {}
    for group, position in gather_object(list(streams.items())):
        by_group.setdefault(group, []).append(position)
    merged = {group: merge_states(positions) for group, positions in by_group.items()}
    state = {**state, "streams": {**state["streams"], **merged}, "processes": accelerator.num_processes}
    teachers = state.pop("teachers")

    # Sharded weights are gathered by all processes; only the main one has the result.
    model_state = whole_state(model)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_MAIN)
    averages = None if ema is None else ema.state_dict(keep=accelerator.is_main_process)
    error = None
    fix = "the last good one is kept; make room on the disk and run the same command again"
    try:
        with writing(path, fix):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(_random_state(accelerator), folder / f"random_{accelerator.process_index}.pt")
            if accelerator.is_main_process:
                save_file(model_state, folder / "model.safetensors")
                torch.save(optimizer_state, folder / "optimizer.pt")
                if accelerator.scaler is not None:
                    torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
                if averages is not None:
                    save_file(averages, folder / "ema.safetensors")
                write_student(accelerator.unwrap_model(model).student, model_state, averages, standardize, temporary)
                (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
                (folder / TEACHERS).write_text(json.dumps(teachers, indent=1), encoding="utf-8")
    except OSError as failure:
        error = str(failure)
    errors = [one for one in gather_object([error]) if one is not None]

    def finish() -> None:
        try:
            if errors:
                raise OSError(errors[0])
            with writing(path, fix):
                _write_manifest(temporary)
                os.replace(temporary, path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in find_checkpoints(output_dir)[:-keep]:
            doomed = old.with_name(old.name + ".tmp")  # so that a kill half-way leaves no broken checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    on_main_process(accelerator, finish)
    return {**state, "teachers": teachers}


def describe_teachers(recipe: Recipe, shapes: dict[str, TeacherShape]) -> dict[str, dict[str, Any]]:
    """What decides the targets, by the teachers' names. JSON-able, and without this machine's folders."""
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
    """Raises ValueError if a run would go on with other teachers than it had, such as a newer revision of one."""
    path = checkpoint / "training_state" / TEACHERS
    if not path.exists():  # of an older version
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in before.keys() & teachers.keys():
        fields = [key for key in ("weights", "dtype", "image_size") if before[name].get(key) != teachers[name][key]]
        if fields:
            differs = [f"{key} {before[name].get(key)!r} there, {teachers[name][key]!r} here" for key in fields]
            raise ValueError(
                f"teachers.{name} is not the one that taught until {checkpoint} ({', '.join(differs)}); bring "
                "its weights back, or choose another output_dir"
            )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that save_checkpoint returned."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def load_weights(checkpoint: Path, model: torch.nn.Module, same_stage: bool) -> None:
    """Weights of the unprepared `Distillation`: of this stage, or of the last one, whose student has fewer heads.

    Raises:
        ValueError: they are of another model.
    """
    saved = load_file(checkpoint / "training_state" / "model.safetensors")
    if not same_stage:  # the balancing starts anew with the terms of a stage, whose number decides its shapes
        saved = {name: value for name, value in saved.items() if not name.startswith("balancing.")}
    missing, unexpected = model.load_state_dict(saved, strict=False)
    if not same_stage:
        missing = [name for name in missing if not name.startswith(("student.adaptors.", "balancing."))]
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint} is of another model: it lacks {missing[:3]} and has {unexpected[:3]} in addition; restore "
            "the recipe that wrote it, or choose another output_dir"
        )


def load_training(
    accelerator: Accelerator,
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    seed: int,
) -> None:
    """All the rest that a stage goes on with, after the model has been prepared: moments, averages, random numbers.

    A process that the run did not have before gets random numbers of its own from `seed`.
    """
    folder = checkpoint / "training_state"
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema.safetensors"))
    random_file = folder / f"random_{accelerator.process_index}.pt"
    if random_file.exists():
        _set_random_state(accelerator, torch.load(random_file, map_location="cpu", weights_only=True))
    else:
        set_seed(seed, device_specific=True)


def skipped_images(state: dict[str, Any]) -> dict[str, int]:
    """Images that all processes have left out since the start, by reason, from a checkpoint's state."""
    lanes = [lane for stream in state["streams"].values() for lane in stream["lanes"].values()]
    return dict(sum((Counter(lane["skipped"]) for lane in lanes), Counter()))


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
