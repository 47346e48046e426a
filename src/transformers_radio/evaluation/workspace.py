"""The folder beside a result, for caches and unfinished work: cleared, or continued if its settings are the same."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from transformers_radio.disk import differences, remove, write_json


def work_folder(path: Path) -> Path:
    """OUTPUT/<model>/<task>.<data>/, beside the result at `path`."""
    return path.with_name(path.name.removesuffix(".json"))


def clear_work(folder: Path, overwrite: bool) -> None:
    """Deletes what an earlier run left if it is to be replaced. All processes call this."""
    state = PartialState()
    state.wait_for_everyone()
    if overwrite and state.is_main_process:
        remove(folder)
    state.wait_for_everyone()


def claim_folder(
    folder: Path,
    settings: dict[str, Any],
    counted: Sequence[str],
    overwrite: bool,
    recognized: Callable[[dict[str, Any]], dict[str, Any]] = lambda there: there,
) -> None:
    """Makes `folder` the place of work with these settings, in its settings.json. All processes call this.

    Work of the same settings stays, whether or not `overwrite` is set.

    Args:
        counted, recognized: which settings must be the same, and those of earlier versions, as for a `Task`.

    Raises:
        ValueError: the folder holds work of other settings, and `overwrite` is False.
    """
    state = PartialState()
    file = folder / "settings.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    state.wait_for_everyone()  # all have read before one writes
    changed = [] if there is None else differences(recognized(there), settings, counted)
    if there is not None and not changed:
        return
    if changed and not overwrite:
        raise ValueError(
            f"{folder} holds work of other settings; it differs in {', '.join(changed)}. Choose another --output, or "
            "replace it with overwrite=true."
        )
    if state.is_main_process:
        remove(folder)
        write_json(file, settings)
    state.wait_for_everyone()
