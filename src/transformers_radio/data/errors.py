"""What ends a run: apart, so that the commands can name it before torch is loaded."""


class SourceError(RuntimeError):
    """The source cannot be read on, or too many of its images cannot be used; the message says what and the fix."""
