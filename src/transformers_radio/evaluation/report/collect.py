"""The result files below some folders, each read once, and every model measured once in each way."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from transformers_radio.evaluation.paths import expand_home
from transformers_radio.evaluation.result import Result

IS_RESULT = {"task", "model", "data", "metrics", "protocol"}  # fields that no other JSON file has together


@dataclass
class Found:
    """A result, its file, and its task with the method, as in the file's name ("segmentation-projection")."""

    path: Path
    method: str
    result: Result


def read_results(folders: Sequence[str | Path]) -> list[Found]:
    """All results in and below the folders, in the order of their paths; a file that is met twice counts once.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no result, or a model was measured twice with other settings: both files are named.
    """
    found: dict[Path, Found] = {}
    for folder in (Path(expand_home(str(folder))) for folder in folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}; name those that hold results of evaluations.")
        for one in _walk(folder):
            found.setdefault(one.path.resolve(), one)
    if not found:
        raise ValueError(
            f"There are no results in {', '.join(map(str, folders))}: measure with transformers-radio eval."
        )
    kept: dict[tuple[str, str, str], Found] = {}
    for one in found.values():
        key = (one.result.model, one.method, one.result.data)
        other = kept.setdefault(key, one)
        if other.result != one.result:
            raise ValueError(
                f"{one.result.model} was measured twice on {one.result.data}, with different "
                f"{_differences(other.result, one.result)}: {other.path} and {one.path}. Leave one of them out, or "
                "give the model another title (TITLE=MODEL) where it is another one."
            )
    for one, other in combinations(kept.values(), 2):
        _check_same_model(one, other)
    return list(kept.values())


def _walk(folder: Path) -> Iterator[Found]:
    """The results of a folder, then those of the folders in it. Work folders beside a result are left out: they may
    hold thousands of files."""
    for root, folders, files in os.walk(folder):
        work = set()
        for name in sorted(files):
            result = _read(Path(root, name)) if name.endswith(".json") else None
            if result is not None:
                work.add(name.removesuffix(".json"))
                yield Found(Path(root, name), name.partition(".")[0], result)
        folders[:] = sorted(set(folders) - work)


def _read(path: Path) -> Result | None:
    """The result in this file; None for another JSON file, such as one in the folder of a model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): measure again, or remove it.") from error
    return Result.read(path) if isinstance(content, dict) and content.keys() >= IS_RESULT else None


def _check_same_model(one: Found, other: Found) -> None:
    """ValueError if two results of one name are of different models: of different weights, if that can be told."""
    if one.result.model != other.result.model:
        return
    if (one.result.task == "sam-coco") != (other.result.task == "sam-coco"):
        return  # whose digest is of the encoder in SAM's place, its neck included
    mine, theirs = one.result.settings, other.result.settings
    if "weights" in mine and mine["weights"] == theirs.get("weights"):
        return  # wherever the model lay
    # a digest holds for the weights in one dtype, and a teacher's position table for its resolution
    comparable = one.result.resolution == other.result.resolution and "dtype" in mine
    if comparable and mine.get("dtype") == theirs.get("dtype"):
        differ = mine.get("weights") != theirs.get("weights")
    else:
        differ = one.result.spec != other.result.spec
    if differ:
        raise ValueError(
            f"{one.path} and {other.path} call different models {one.result.model!r} ({one.result.spec}, "
            f"{other.result.spec}, or its weights changed in between): give them titles, as TITLE=MODEL, or measure "
            "again."
        )


def _differences(one: Result, other: Result) -> str:
    """What differs, settings one by one."""
    keys = [key for key in {**one.settings, **other.settings} if one.settings.get(key) != other.settings.get(key)]
    changed = [f"{key} ({one.settings.get(key)!r}, {other.settings.get(key)!r})" for key in keys]
    fields = [name for name in ("resolution", "counts", "metrics") if getattr(one, name) != getattr(other, name)]
    return ", ".join(changed or fields or ["protocol"])
