"""The errors that end a run; in a file of their own, so that commands can name them before torch is loaded."""

import re


class SourceError(RuntimeError):
    """The source cannot be read further, or too many of its images cannot be used; the message names the fix."""


class FileError(ValueError):
    """A file is damaged, incomplete or not what its name says; the message is one line with its name and the fix."""


class ColumnError(ValueError):
    """There is no column of images, or more than one; the message says what is there and the fix."""


# Errors that a user can do something about: commands print them as one line. All others keep their traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SourceError)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks.

    Some libraries write paragraphs or nothing, fsspec only the address, and DataLoader a traceback.
    """
    text, name = str(error), type(error).__name__
    if "Original Traceback (most recent call last):" in text:
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    text = " ".join(text.split()) or name
    if isinstance(error, FileNotFoundError) and error.errno is None and error.__cause__ is not None:
        text += f" ({type(error.__cause__).__name__}: {one_line(error.__cause__)})"
    return text
