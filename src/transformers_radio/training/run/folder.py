"""The folder of a run: which run it holds, whether that may be resumed or replaced, and that one process trains in it.

output_dir/
  run.yaml              the recipe with its overrides; a changed recipe does not resume it
  metrics.jsonl         one line per log interval
  checkpoints/          see checkpoint.py
  statistics/           PHI-S of the teachers' features, with loss.standardization
  student/              the finished student, a Hugging Face folder
"""

import json
import logging
import os
import re
import zlib
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from transformers_radio.data import one_line
from transformers_radio.disk import differences, existing, lock_folder, remove, replace_whole, writing
from transformers_radio.training.recipe import Recipe, load_recipe, recipe_to_dict, save_recipe

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
MANIFEST = "manifest.json"  # size and checksum of each file of a checkpoint
STATE = "training_state/state.json"
NEEDED = {STATE, "training_state/model.safetensors", "training_state/optimizer.pt", "config.json"}
# What a start leaves before RUN_FILE, which says that the files in WRITTEN belong to a run.
BEFORE_RUN = (".lock", f"{RUN_FILE}.tmp")
# What a new run deletes of the one before, in this order: a finished run counts as finished until its student is gone.
# Nothing else in output_dir is ever deleted.
WRITTEN = ("metrics.jsonl", "metrics.jsonl.tmp", "checkpoints", "statistics", "tracker", "student.tmp", "student")
MAX_LISTED = 10  # files or fields that a message names
# What may differ between two starts of one run: none of it changes which images the student sees or, but for rounding,
# what it learns. The data's position remembers its lanes, the images in a pass and a fingerprint of the source, and
# does not fit others.
FREE_FIELDS = (
    *("output_dir", "checkpoints", "log_every_steps", "tracker", "overwrite", "restart_data"),
    *("data.num_workers", "data.path", "data.max_skipped_share", "data.retry_seconds", "data.lanes"),
    *("student.compile", "student.gradient_checkpointing"),
)
FREE_PATTERN = re.compile(  # the same files elsewhere, as with data.path; what only memory and speed depend on
    r"data\.sources\.[^.]+\.path|teachers\.[^.]+\.(placement|compile)|stages\.[^.]+(\.groups\.[^.]+)?\.micro_batch_size"
)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return output_dir / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, oldest first; unfinished (`.tmp`) and damaged ones do not count."""
    return sorted(
        path for path in (output_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)
    )


def size_and_checksum(path: Path) -> list[int] | None:
    """Bytes and CRC-32 of a file, which tell damage by a failing disk or machine; None where there is no file."""
    if not path.is_file():
        return None
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return [path.stat().st_size, value]


def read_manifest(checkpoint: Path) -> dict[str, list[int]]:
    """File -> [bytes, checksum], for all files of a checkpoint.

    Raises:
        ValueError: the manifest is damaged.
        OSError: it cannot be read.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not NEEDED <= manifest.keys():
        raise ValueError(f"{MANIFEST} does not list {', '.join(sorted(NEEDED))}")
    return manifest


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None when it is whole."""
    try:
        manifest = read_manifest(checkpoint)
        wrong = _differing(checkpoint, manifest)
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8")) if wrong is None else None
    except (OSError, ValueError) as error:
        return one_line(error)
    if state is not None and checkpoint != checkpoint_folder(checkpoint.parent.parent, state["step"]):
        return f"it holds step {state['step']}, not that of its name"
    return wrong


def check_student(recipe: Recipe) -> None:
    """Raises ValueError when the finished student is not the last checkpoint's or, without that, is unreadable."""
    student = Path(recipe.output_dir) / "student"
    steps = sum(stage.steps for stage in recipe.stages.values())
    last = checkpoint_folder(student.parent, steps)
    if damage(last) is None:
        files = {name: entry for name, entry in read_manifest(last).items() if not name.startswith("training_state/")}
        wrong = _differing(student, files) or _unreadable(student)
        fix = f"delete this folder, and the same command makes it again from {last}"
    else:
        wrong, fix = _unreadable(student), "restore it, or set overwrite=true (start over)"
        if find_checkpoints(student.parent):
            fix = "delete this folder, and the same command resumes from the last checkpoint"
    if wrong is not None:
        raise ValueError(f"{student} is damaged ({wrong}): {fix}")


def _unreadable(student: Path) -> str | None:
    """What is wrong with a student, as far as its own files tell."""
    try:
        for name in ("config.json", "teacher_manifest.json"):
            if (student / name).exists() or name == "config.json":  # students of before have no manifest
                json.loads((student / name).read_text(encoding="utf-8"))
        if not any(student.glob("*.safetensors")):
            return "it has no weights"
        for path in student.glob("*.safetensors"):
            with safe_open(path, "pt"):  # compares the size with what the header says
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return one_line(error)
    return None


def _differing(folder: Path, manifest: dict[str, list[int]]) -> str | None:
    for name, entry in manifest.items():
        found = size_and_checksum(folder / name)
        if found is None:
            return f"{name} is missing"
        if found != entry:
            size = entry[0] if isinstance(entry, list) and entry else None
            return (
                f"{name} has {found[0]} bytes instead of {size}"
                if found[0] != size
                else f"{name} has another checksum"
            )
    return None


def find_run(recipe: Recipe) -> tuple[bool, Path | None]:
    """Whether output_dir holds this run, finished; and the checkpoint to resume from, if any. Changes nothing.

    The checkpoint is the newest that is whole; what is wrong with newer ones is logged.

    Raises:
        FileExistsError: the folder holds a run of another recipe, or files that belong to no run: without run.yaml
            they may be the user's, whatever their names.
        ValueError: all checkpoints are damaged, or RUN_FILE or the finished student is.
        OSError: the folder cannot be written.
    """
    output_dir = Path(recipe.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"output_dir {output_dir} is a file; choose another output_dir")
    checkpoints = find_checkpoints(output_dir)
    finished = (output_dir / "student").exists()
    if output_dir.exists() and not (output_dir / RUN_FILE).exists():
        cache = Path(recipe.teacher_cache or "").absolute()  # may lie here, and is made before RUN_FILE
        foreign = sorted(
            path.name for path in output_dir.iterdir() if path.name not in BEFORE_RUN and path.absolute() != cache
        )
        if foreign:
            raise FileExistsError(
                f"output_dir {output_dir} is not empty and holds no run: it has {_listed(foreign)}, but no "
                f"{RUN_FILE}; choose another output_dir"
            )
    if not finished:
        check_writable(output_dir, "output_dir")
        if recipe.teacher_cache is not None:
            check_writable(Path(recipe.teacher_cache), "teacher_cache")
        if (output_dir / ".lock").exists():
            _lock(output_dir).close()  # raises if another process trains here
    if not (checkpoints or finished):
        return False, None
    before = recorded_recipe(recipe)
    changed = [] if before is None else _changed_fields(recipe, before)
    if before is None or (recipe.overwrite and (changed or finished)):
        return False, None
    if changed:
        raise FileExistsError(
            f"output_dir {output_dir} holds a run of another recipe; it differs in {_listed(changed)}. "
            "Restore these to continue it, choose another output_dir, or set overwrite=true to delete it"
        )
    if finished:
        check_student(recipe)
        return True, None
    reasons = []
    for checkpoint in reversed(checkpoints):
        wrong = damage(checkpoint)
        if wrong is None:
            return False, checkpoint
        reasons.append(f"{checkpoint.name}: {wrong}")
        if not recipe.overwrite or len(checkpoints) > 1:
            logger.warning("checkpoint %s is damaged (%s); falling back to the one before", checkpoint, wrong)
    if recipe.overwrite:
        return False, None
    raise ValueError(
        f"all checkpoints in {output_dir / 'checkpoints'} are damaged ({'; '.join(reasons)}); restore one, or set "
        "overwrite=true (start over)"
    )


def recorded_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of the run in output_dir that this start may resume, if there is one. Changes nothing.

    Raises:
        ValueError: there is one, and it is unknown which, as RUN_FILE is damaged.
    """
    output_dir = Path(recipe.output_dir)
    finished = (output_dir / "student").exists()
    if not (finished or find_checkpoints(output_dir)) or (finished and recipe.overwrite):
        return None
    try:
        return load_recipe(output_dir / RUN_FILE, trust_code=True)  # it is only compared
    except (ValueError, OSError) as error:
        if recipe.overwrite:  # it will be deleted
            return None
        raise ValueError(
            f"{output_dir / RUN_FILE} cannot be read ({error}), so it is unknown which run this is; restore the file, "
            "choose another output_dir, or set overwrite=true (start over)"
        ) from error


def check_writable(folder: Path, field: str) -> None:
    """Raises OSError when a folder cannot be made or written into. Changes nothing."""
    nearest = existing(folder.absolute())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "may not be written into" if nearest.is_dir() else "is not a folder"
        raise OSError(f"{field} {folder} cannot be written: {nearest} {reason}; choose another {field}")


def open_run(recipe: Recipe, resume_from: Path | None) -> IO[str]:
    """Takes the folder for this process, once everything has been checked; without `resume_from` the run starts over.

    Returns:
        The lock, to be kept open while training. The system releases it however the process ends.

    Raises:
        FileExistsError: another process trains in this folder.
    """
    output_dir = Path(recipe.output_dir)
    lock = _lock(output_dir)
    try:
        _prepare_folder(recipe, output_dir, resume_from)
    except BaseException:
        lock.close()
        raise
    return lock


def _prepare_folder(recipe: Recipe, output_dir: Path, resume_from: Path | None) -> None:
    if resume_from is None:
        # RUN_FILE stays until the new one replaces it: a start that is killed in here leaves a run, not strange files.
        for name in WRITTEN:
            path = output_dir / name
            if name == "student" and path.is_dir():  # half of it must not count as a finished run
                path = path.rename(output_dir / "student.tmp")
            remove(path)
    for leftover in (output_dir / "checkpoints").glob("*.tmp"):
        remove(leftover)
    for newer in find_checkpoints(output_dir):
        if resume_from is not None and newer > resume_from:  # damaged, and in the way of the one to be written again
            remove(newer.with_name(newer.name + ".damaged"))
            os.replace(newer, newer.with_name(newer.name + ".damaged"))
    run_file = output_dir / RUN_FILE
    with writing(run_file), replace_whole(run_file) as temporary:
        save_recipe(recipe, temporary)


def _lock(output_dir: Path) -> IO[str]:
    return lock_folder(
        output_dir,
        f"another process is training in output_dir {output_dir}; wait for it, stop it, or choose another",
    )


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines that a killed run wrote after the checkpoint from which it resumes, and damaged ones."""
    if not path.exists():
        return
    kept, damaged = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # a kill may have cut off what follows the last line break
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            damaged.append(str(number))
    if damaged:
        logger.warning("%s: dropping the damaged lines %s", path, ", ".join(damaged))
    with writing(path), replace_whole(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _changed_fields(recipe: Recipe, recorded: Recipe) -> list[str]:
    return differences(recipe_to_dict(recorded), recipe_to_dict(recipe), is_free=_may_change)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _may_change(key: str) -> bool:
    return bool(FREE_PATTERN.fullmatch(key)) or key in FREE_FIELDS or key.split(".")[0] in FREE_FIELDS
