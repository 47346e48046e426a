"""What ends a run: apart, so that the commands can name it before torch is loaded."""

import re


class SourceError(RuntimeError):
    """The source cannot be read on, or too many of its images cannot be used; the message says what and the fix."""


<<<<<<< HEAD
class FileError(ValueError):
    """A file is damaged, incomplete or not what its name says; the message is a line with its name and the fix."""


class ColumnError(ValueError):
    """There is no column of images, or more than one; the message says what is there and the fix."""


def one_line(error: BaseException) -> str:
    """What an error says, of which some libraries make a paragraph or nothing, and fsspec the address alone."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and error.errno is None and error.__cause__ is not None:
        text += f" ({type(error.__cause__).__name__}: {one_line(error.__cause__)})"
    return text
=======
# What a user can do something about: the commands print these as one line. All others keep their traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SourceError)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; of one that a data worker raised, without its traceback."""
    text, name = str(error), type(error).__name__
    if "Original Traceback (most recent call last):" in text:  # DataLoader's
        text = re.split(rf"^[\w.]*{name}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or name
>>>>>>> state
