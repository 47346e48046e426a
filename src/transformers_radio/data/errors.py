"""What ends a run: apart, so that the commands can name it before torch is loaded."""


class SourceError(RuntimeError):
    """The source cannot be read on, or too many of its images cannot be used; the message says what and the fix."""


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
