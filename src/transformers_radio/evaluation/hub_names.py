"""What is no folder is taken for a name on the Hub; an error must say both, since it may be a mistyped path."""

import contextlib
import os
from collections.abc import Iterator


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
