"""The folder of a run: which run it holds, whether it may be continued or replaced, and that one process trains in it.

output_dir/
  run.yaml              the recipe with its overrides; a changed recipe does not continue it
  metrics.jsonl         one line a log interval
  checkpoints/          see checkpoint.py
  statistics/           of the teachers' features, with loss.standardization
  student/              the finished student, a Hugging Face folder
"""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import IO, Any

from .recipe import Recipe, load_recipe, recipe_to_dict, save_recipe

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.yaml"
MANIFEST = "manifest.json"  # of a checkpoint
# A start leaves these before RUN_FILE, which says that the rest of WRITTEN is a run's.
BEFORE_RUN = (".lock", f"{RUN_FILE}.tmp")
# What a new run deletes of the one before, in this order: a run that is finished counts as such until it is gone.
# Nothing else in output_dir is ever deleted.
WRITTEN = ("metrics.jsonl", "metrics.jsonl.tmp", "checkpoints", "statistics", "tracker", "student.tmp", "student")
MAX_LISTED = 10  # entries of a folder that a message names
# What may differ between two starts of one run: none of it changes which images the student sees or, but for rounding,
# what it learns. The data's position remembers its lanes, the images in a pass and a fingerprint of the source, and
# does not fit others.
FREE_FIELDS = (
    *("output_dir", "checkpoints", "log_every_steps", "tracker", "overwrite", "restart_data"),
    *("data.num_workers", "data.path", "data.max_skipped_share", "data.retry_seconds", "data.lanes"),
    *("student.compile", "student.gradient_checkpointing"),
)
FREE_PATTERN = re.compile(  # as data.path: the same files elsewhere; and what only memory and speed depend on
    r"data\.sources\.[^.]+\.path|teachers\.[^.]+\.(placement|compile)|stages\.[^.]+(\.groups\.[^.]+)?\.micro_batch_size"
)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, oldest first; unfinished (`.tmp`) and damaged ones do not count."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.suffix == "")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def checksum(path: Path) -> int:
    """CRC-32, which finds what a dying disk or machine leaves."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None when it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, crc) in manifest.items():
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            if checksum(checkpoint / name) != crc:
                return f"{name} has another checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def find_run(recipe: Recipe) -> tuple[bool, Path | None]:
    """Whether output_dir holds this run finished, and the checkpoint to go on from, if any. Changes nothing.

    That is the newest that is whole; what is wrong with newer ones is logged.

    Raises:
        FileExistsError: the folder holds a run of another recipe, or files of no run (without run.yaml, whatever their
            names: they may be the user's).
        ValueError: all checkpoints are damaged.
    """
    output_dir = Path(recipe.output_dir)
    checkpoints = find_checkpoints(output_dir)
    finished = (output_dir / "student").exists()
    if output_dir.exists() and not (output_dir / RUN_FILE).exists():
        foreign = sorted(path.name for path in output_dir.iterdir() if path.name not in BEFORE_RUN)
        if foreign:
            listed = ", ".join(foreign[:MAX_LISTED])
            more = f" and {len(foreign) - MAX_LISTED} more" if len(foreign) > MAX_LISTED else ""
            raise FileExistsError(
                f"output_dir {output_dir} is not empty and holds no run: it has {listed}{more}, but no {RUN_FILE}; "
                "choose another output_dir"
            )
    if not (checkpoints or finished):
        return False, None
    try:
        changed = _changed_fields(recipe, output_dir / RUN_FILE)
    except ValueError as error:
        changed = [f"{RUN_FILE}, which cannot be read ({error})"]
    if recipe.overwrite and (changed or finished or all(damage(one) for one in checkpoints)):
        return False, None
    if changed:
        raise FileExistsError(
            f"output_dir {output_dir} holds a run of another recipe; it differs in {', '.join(changed)}. "
            "Restore these to continue it, choose another output_dir, or set overwrite=true to delete it"
        )
    if finished:
        return True, None
    for checkpoint in reversed(checkpoints):
        wrong = damage(checkpoint)
        if wrong is None:
            return False, checkpoint
        logger.warning("checkpoint %s is damaged (%s); falling back to the one before", checkpoint, wrong)
    raise ValueError(
        f"all checkpoints in {output_dir / 'checkpoints'} are damaged; restore one, or set overwrite=true (start over)"
    )


def recorded_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of the run in output_dir that this start may continue, if there is one. Changes nothing."""
    output_dir = Path(recipe.output_dir)
    finished = (output_dir / "student").exists()
    if not (finished or find_checkpoints(output_dir)) or (finished and recipe.overwrite):
        return None
    try:
        return load_recipe(output_dir / RUN_FILE)
    except (ValueError, FileNotFoundError):
        if recipe.overwrite:  # it will be deleted
            return None
        raise


def open_run(recipe: Recipe, resume_from: Path | None) -> IO[str]:
    """Takes the folder for this process, once everything has been checked; without `resume_from` the run begins anew.

    Returns:
        The lock, to be kept open while training. The system releases it however the process ends.

    Raises:
        FileExistsError: another process trains in this folder.
    """
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = (output_dir / ".lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(
                f"another process is training in output_dir {output_dir}; wait for it, stop it, or choose another"
            ) from error
    if resume_from is None:
        # RUN_FILE stays until the new one replaces it: a start that is killed in here leaves a run, not strange files.
        for name in WRITTEN:
            path = output_dir / name
            if path.is_dir():
                if name == "student":  # half of it must not count as a finished run
                    path = path.rename(output_dir / "student.tmp")
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for leftover in (output_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(leftover)
    for newer in find_checkpoints(output_dir):
        if resume_from is not None and newer > resume_from:  # damaged: out of the way of the one to be written again
            shutil.rmtree(newer.with_name(newer.name + ".damaged"), ignore_errors=True)
            os.replace(newer, newer.with_name(newer.name + ".damaged"))
    temporary = output_dir / f"{RUN_FILE}.tmp"
    save_recipe(recipe, temporary)
    os.replace(temporary, output_dir / RUN_FILE)
    return lock


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines that a killed run wrote after the checkpoint it is continued from."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _changed_fields(recipe: Recipe, run_file: Path) -> list[str]:
    before = _flatten(recipe_to_dict(load_recipe(run_file)))
    now = _flatten(recipe_to_dict(recipe))
    return [
        f"{key} ({before.get(key)!r} there, {now.get(key)!r} here)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    return bool(FREE_PATTERN.fullmatch(key)) or key in FREE_FIELDS or key.split(".")[0] in FREE_FIELDS


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
