"""The names of models: TITLE=TYPE:CHECKPOINT@SIZE. What is not a folder is taken for a name on the Hub; an error must
say both, since it may be a mistyped path."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from transformers_radio.evaluation.paths import path_name
from transformers_radio.teachers import TEACHERS


@contextlib.contextmanager
def folder_or_hub(name: str) -> Iterator[None]:
    """Around what opens `name`.

    Raises:
        FileNotFoundError: instead of whatever the Hub's libraries raise, where there is no such path.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if os.path.exists(name) or "://" in name:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            f"There is no folder {name}, and the Hub does not give one of this name: {reason}. Check the path, or the "
            "connection."
        ) from error


def split_title(spec: str) -> tuple[str, str]:
    """("title", "spec") of "title=spec", or of "spec" alone, whose title is the last part of its path or name.

    A size behind the model ("spec@224") is not part of either.
    """
    spec, _ = split_size(spec)
    title, equals, source = spec.partition("=")
    if equals and title and source and not os.path.exists(spec):
        return title, source
    kind, colon, checkpoint = spec.partition(":")
    path = Path(checkpoint if colon and kind in TEACHERS else spec)
    if path.is_file():
        path = path.with_suffix("")
    parts = [part for part in path.parts[-2:] if part != ".."]
    # runs/mine/student is "mine/student": the folder that a run leaves is always called so
    return "/".join(parts) if path.name in ("student", "checkpoint") else path_name(path), spec


def split_size(spec: str) -> tuple[str, int | None]:
    """("spec", 224) of "spec@224"; a folder or file of that name is no size."""
    source, at, size = spec.rpartition("@")
    if not at or not size.isdecimal() or Path(spec.partition("=")[2] or spec).exists():
        return spec, None
    return source, int(size)


def check_model(spec: str) -> None:
    """Look for what `encoder.load_encoder` would load, in a moment: before torch is loaded, and without the weights.

    Raises:
        FileNotFoundError: there is no such folder or file, nor a model of this name on the Hub.
        ValueError: an unknown type.
    """
    source = split_title(spec)[1]
    kind, colon, checkpoint = source.partition(":")
    if any(os.path.exists(os.path.expanduser(path)) for path in (spec, source)):
        return
    if colon and kind in TEACHERS:
        if checkpoint.startswith(("/", "./", "../", "~")) and not os.path.exists(os.path.expanduser(checkpoint)):
            raise FileNotFoundError(f"There is no {checkpoint}, which {spec} names. Check the path.")
        return
    if colon:
        raise ValueError(f"{source!r} begins with no type of model: use one of {', '.join(TEACHERS)}, or a folder.")
    from huggingface_hub import hf_hub_download

    with folder_or_hub(source):
        hf_hub_download(source, "config.json")
