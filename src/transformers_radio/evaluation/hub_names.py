"""What is no folder is taken for a name on the Hub; an error must say both, since it may be a mistyped path."""

import contextlib
import os
from collections.abc import Iterator

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


def check_model(spec: str) -> None:
    """Look for what `encoder.load_encoder` would load, in a moment: before torch is loaded, and without the weights.

    Raises:
        FileNotFoundError: there is no such folder or file, nor a model of this name on the Hub.
        ValueError: an unknown type.
    """
    title, equals, source = spec.partition("=")
    source = source if title and equals and source else spec
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
