"""What ends a run: apart, so that the commands can name it before torch is loaded."""

import re


class SourceError(RuntimeError):
    """The source cannot be read on, or too many of its images cannot be used; the message says what and the fix."""


# What a user can do something about: the commands print these as one line. All others keep their traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SourceError)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; of one that a data worker raised, without its traceback."""
    text, name = str(error), type(error).__name__
    if "Original Traceback (most recent call last):" in text:  # DataLoader's
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or name
