"""Checkpoints that survive kill -9: written under a temporary name, renamed when whole, the last few kept.

output_dir/checkpoints/step-00001000/
  config.json, model.safetensors, *.py      a Hugging Face folder that AutoModel loads
  training_state/     optimizer, random generators (Accelerate), state.json: step, schedule, data position
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging as transformers_logging

from transformers_radio.data import merge_states
from transformers_radio.modeling import RadioImageProcessor

from .run_folder import find_checkpoints


def save_checkpoint(
    accelerator: Accelerator, student: Any, output_dir: Path, keep: int, state: dict[str, Any], stream: dict[str, Any]
) -> dict[str, Any]:
    """Writes the checkpoint of state["step"] on all processes together.

    Args:
        student: the prepared model.
        state: JSON-able, the same on every process.
        stream: this process's ImageStream.state_dict().

    Returns:
        The state as load_checkpoint will return it: with the data position of all processes.
    """
    path = output_dir / "checkpoints" / f"step-{state['step']:08d}"
    temporary = path.with_name(path.name + ".tmp")
    accelerator.save_state(str(temporary / "training_state"))
    state = {**state, "stream": merge_states(gather_object([stream]))}
    write_student(accelerator, student, temporary)
    if accelerator.is_main_process:
        (temporary / "training_state" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, path)
        for old in find_checkpoints(output_dir)[:-keep]:
            doomed = old.with_name(old.name + ".tmp")  # so that a kill half-way leaves no broken checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return state


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Restores model, optimizer and random generators; returns the state that save_checkpoint returned."""
    state = json.loads((path / "training_state" / "state.json").read_text(encoding="utf-8"))
    accelerator.load_state(str(path / "training_state"))
    return state


def skipped_images(state: dict[str, Any]) -> dict[str, int]:
    """Images that all processes have left out since the start, by reason, from a checkpoint's state."""
    lanes = (state["stream"] or {"lanes": {}})["lanes"].values()
    return dict(sum((Counter(lane["skipped"]) for lane in lanes), Counter()))


def write_student(accelerator: Accelerator, student: Any, folder: Path) -> None:
    """A Hugging Face folder: weights, config, remote code, image processor. Called on all processes."""
    state_dict = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(student)
        transformers_logging.disable_progress_bar()  # it would break the training's own into pieces
        model.save_pretrained(folder, state_dict=state_dict)
        transformers_logging.enable_progress_bar()
        side = model.preferred_resolution
        processor = RadioImageProcessor(size={"height": side, "width": side}, size_divisor=model.min_resolution_step)
        processor.save_pretrained(folder)
    accelerator.wait_for_everyone()


def publish_student(accelerator: Accelerator, student: Any, output_dir: Path) -> Path:
    """Writes the finished student to output_dir/student, whole or not at all."""
    temporary, path = output_dir / "student.tmp", output_dir / "student"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    write_student(accelerator, student, temporary)
    if accelerator.is_main_process:
        os.replace(temporary, path)
    accelerator.wait_for_everyone()
    return path
