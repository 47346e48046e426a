"""Patience with servers: which errors are worth another attempt, and how long to wait."""

import asyncio
import concurrent.futures
import gzip
import http.client
import logging
import ssl
import tarfile
import time
import zlib

from huggingface_hub.errors import OfflineModeIsEnabled

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds
# Libraries through which fsspec and the Hub reach servers. None of them has to be installed, so an error is recognized
# by the name of the library that defines it.
NETWORK_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpcore2"}
NETWORK_LIBRARIES |= {"httpx", "httpx2", "requests", "urllib3"}
# The server asks for another attempt: request timeout, too early, too many requests.
TEMPORARY_STATUS = (408, 425, 429)
PERMANENT_ERRORS = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(OfflineModeIsEnabled, ssl.SSLCertVerificationError),
    *(gzip.BadGzipFile, zlib.error),  # damaged; a transfer that ended early gives an EOFError
)
TEMPORARY_ERRORS = (
    *(OSError, asyncio.TimeoutError, concurrent.futures.TimeoutError, http.client.HTTPException),
    EOFError,  # a transfer that ended early
)


class Retry:
    """The attempts to read one thing from a server.

    Args:
        what: what is attempted, for the log, e.g. "Reading 'a.tar' of https://...".
        seconds: time after the first failure in which there are new attempts.
    """

    def __init__(self, what: str, seconds: float):
        self.what = what
        self.seconds = seconds
        self.failures = 0
        self.started = 0.0

    def succeeded(self) -> None:
        """The server has answered: the next failure counts as a first one again."""
        self.failures = 0

    def wait(self, error: Exception) -> bool:
        """Sleeps until the next attempt: 1, 2, 4, ... seconds. False if it would be useless, or the time is up."""
        if self.seconds == 0 or not is_temporary(error):
            return False
        if self.failures == 0:
            self.started = time.monotonic()
        self.failures += 1
        left = self.started + self.seconds - time.monotonic()
        if left <= 0:
            return False
        pause = min(2.0 ** (self.failures - 1), LONGEST_PAUSE, left)
        logger.warning(
            "%s failed (%s: %s). Trying again in %.0f s; giving up in %.0f s (data.retry_seconds=%g).",
            *(self.what, type(error).__name__, error, pause, left, self.seconds),
        )
        time.sleep(pause)
        return True

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started if self.failures else 0
        return f"tried for {seconds:.0f} s, {max(1, self.failures)} times"


def is_temporary(error: BaseException) -> bool:
    """Whether the connection or the server has failed, rather than the request or the file.

    The first cause decides: fsspec turns any answer of a web server, also "503 Service Unavailable", into a
    FileNotFoundError.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    verdicts = (_verdict(cause) for cause in reversed(chain))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _verdict(error: BaseException) -> bool | None:
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in TEMPORARY_STATUS
    if isinstance(error, PERMANENT_ERRORS) or type(error).__name__ == "TooManyRedirects":
        return False
    if isinstance(error, tarfile.ReadError):  # the transfer has ended early, or this is not a tar at all
        return "unexpected end of data" in str(error)
    if isinstance(error, TEMPORARY_ERRORS):
        return True
    libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return True if libraries & NETWORK_LIBRARIES else None


def _http_status(error: BaseException) -> int | None:
    """The status code of an HTTP answer, wherever the client's library keeps it."""
    if type(error).__module__ == "aiohttp.http_exceptions":  # its "400" means an answer that ended early
        return None
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [getattr(response, "status_code", None), getattr(response, "status", None)]
    found += [getattr(error, name, None) for name in ("status_code", "status", "code")]
    return next((code for code in found if isinstance(code, int) and 100 <= code < 600), None)
