"""Checkpoints that survive kill -9: written under a temporary name, renamed when whole, the last few kept.

output_dir/
  recipe.yaml           what the run does; a changed recipe does not continue it
  metrics.jsonl         one line a log interval
  checkpoints/step-00001000/
    config.json, model.safetensors, *.py      a Hugging Face folder that AutoModel loads
    training_state/     optimizer, random generators (Accelerate), state.json: step, schedule, data position
  student/              the finished student, a Hugging Face folder
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging as transformers_logging

from transformers_radio.data import merge_states
from transformers_radio.modeling import RadioImageProcessor

from .recipe import Recipe, load_recipe, recipe_to_dict, save_recipe

# What may differ between two starts of one run: none of it changes the student's weights.
FREE_FIELDS = ("output_dir", "checkpoints", "log_every_steps", "tracker", "overwrite")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; unfinished ones (`.tmp`) do not count."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def prepare_output_dir(recipe: Recipe) -> tuple[bool, Path | None]:
    """Makes output_dir ready; returns whether the run is finished, and the checkpoint to go on from, if any.

    Raises:
        FileExistsError: the folder holds a run of another recipe, or files that are no run.
    """
    output_dir = Path(recipe.output_dir)
    if recipe.overwrite and (output_dir / "recipe.yaml").exists():
        shutil.rmtree(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / "recipe.yaml").exists():
        raise FileExistsError(f"output_dir {output_dir} is not empty and holds no run; choose another output_dir")
    if (output_dir / "recipe.yaml").exists():
        changed = _changed_fields(recipe, output_dir)
        if changed:
            raise FileExistsError(
                f"output_dir {output_dir} holds a run of another recipe; it differs in {', '.join(changed)}. "
                "Restore these to continue it, choose another output_dir, or set overwrite=true to delete it"
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in (output_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(leftover)
    if (output_dir / "student").exists():
        return True, None
    temporary = output_dir / "recipe.yaml.tmp"
    save_recipe(recipe, temporary)
    os.replace(temporary, output_dir / "recipe.yaml")
    checkpoints = find_checkpoints(output_dir)
    return False, checkpoints[-1] if checkpoints else None


def save_checkpoint(
    accelerator: Accelerator, student: Any, output_dir: Path, keep: int, step: int, state: dict[str, Any], stream: dict
) -> Path:
    """Writes the checkpoint of `step` on all processes together.

    Args:
        student: the prepared model.
        state: JSON-able, the same on every process.
        stream: this process's ImageStream.state_dict().
    """
    path = checkpoint_path(output_dir, step)
    temporary = path.with_name(path.name + ".tmp")
    accelerator.save_state(str(temporary / "training_state"))
    streams = gather_object([stream])
    write_student(accelerator, student, temporary)
    if accelerator.is_main_process:
        state = {**state, "step": step, "stream": merge_states(streams)}
        (temporary / "training_state" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, path)
        for old in find_checkpoints(output_dir)[:-keep]:
            doomed = old.with_name(old.name + ".tmp")  # so that a kill half-way leaves no broken checkpoint
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return path


def write_student(accelerator: Accelerator, student: Any, folder: Path) -> None:
    """A Hugging Face folder: weights, config, remote code, image processor. Called on all processes."""
    state_dict = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(student)
        transformers_logging.disable_progress_bar()  # it would break the training's own into pieces
        model.save_pretrained(folder, state_dict=state_dict)
        transformers_logging.enable_progress_bar()
        RadioImageProcessor(
            size={"height": model.config.image_size, "width": model.config.image_size}
        ).save_pretrained(folder)
    accelerator.wait_for_everyone()


def publish_student(accelerator: Accelerator, student: Any, output_dir: Path) -> Path:
    """Writes the finished student to output_dir/student, whole or not at all."""
    temporary, path = output_dir / "student.tmp", output_dir / "student"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    write_student(accelerator, student, temporary)
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Restores model, optimizer and random generators; returns what save_checkpoint was given as state, plus step."""
    state = json.loads((path / "training_state" / "state.json").read_text(encoding="utf-8"))
    accelerator.load_state(str(path / "training_state"))
    return state


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines that a killed run wrote after the checkpoint it is continued from."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _changed_fields(recipe: Recipe, output_dir: Path) -> list[str]:
    before = _flatten(recipe_to_dict(load_recipe(output_dir / "recipe.yaml")))
    now = _flatten(recipe_to_dict(recipe))
    return [
        f"{key} ({before.get(key)!r} there, {now.get(key)!r} here)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in FREE_FIELDS
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
