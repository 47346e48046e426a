"""What each data set of a recipe consists of. A run finds out once, in one process, and tells the others."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .config import DataConfig, SourceConfig
from .errors import one_line
from .files import find_files, local_path
from .remote import is_url
from .retry import Retry

# Longest wait for the Hub when a dataset is opened for the first time: its name may be a mistyped local path.
FIRST_OPENING_SECONDS = 30.0
Result = TypeVar("Result")


@dataclass
class Found:
    """The files of a data set.

    Attributes:
        kind: as `files.kind_of`; None for a dataset on the Hub of another form, which `datasets` reads.
        folder: that names in keys are relative to.
        files: paths or URLs.
        notes: sentences about files that are there and not read.
        is_hub: whether the path was looked up on the Hub.
        types: column -> type, as the page of a dataset on the Hub states them.
    """

    kind: str | None
    folder: str
    files: list[str]
    notes: list[str]
    is_hub: bool = False
    types: dict[str, str] = field(default_factory=dict)


Key = tuple[str, str, str | None]
_kept: dict[Key, Found] = {}
# The Hub ids of datasets that this process has opened. Every stage of a run opens its data anew.
_opened_on_hub: set[str] = set()


def list_files(config: DataConfig) -> dict[Key, Found]:
    """Finds the files of all data sets of a recipe, for `keep_files`.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is not clear what to read.
    """
    return {
        (source.path, source.split, source.name): find_source(source, where_of(name), config.retry_seconds)
        for name, source in config.named_sources().items()
    }


@contextlib.contextmanager
def keep_files(found: dict[Key, Found]) -> Iterator[None]:
    """Within this, every stream that is opened has these files, and nothing is listed again.

    Otherwise files that are added later would be seen by only a part of the run.
    """
    before = dict(_kept)
    _kept.update(found)
    try:
        yield
    finally:
        _kept.clear()
        _kept.update(before)


def find_source(config: SourceConfig, where: str, retry_seconds: float) -> Found:
    """The files of a data set, from `keep_files` or from the disk or server.

    Raises:
        FileNotFoundError, ValueError: nothing is there, it is not clear what to read, or the server still fails.
    """
    key = (config.path, config.split, config.name)
    if key in _kept:
        return _kept[key]

    def find_on_server() -> Found:
        with explained(config, where, "as files"):
            return find()

    def find() -> Found:
        kind, folder, files, notes = find_files(config.path, config.split, where)
        return Found(kind, folder, files, notes)

    path = local_path(config.path)
    if is_url(path) or path.lower().endswith(".txt"):
        return patiently(config.path, retry_seconds, find_on_server)
    found = find()
    if found.kind is not None:
        return found
    seconds = retry_seconds if config.path in _opened_on_hub else min(retry_seconds, FIRST_OPENING_SECONDS)
    found = patiently(config.path, seconds, lambda: _find_on_hub(config, where))
    _opened_on_hub.add(config.path)
    return found


def where_of(label: str) -> str:
    """The field of the recipe that describes the data set of this name."""
    return f"data.sources.{label}" if label else "data"


def patiently(path: str, seconds: float, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns; it is repeated while a server fails."""
    retry = Retry(f"Opening {path}", seconds)
    while True:
        try:
            return attempt()
        except Exception as error:
            if retry.wait(error):
                continue
            if retry.failures and isinstance(error, ValueError):
                raise ValueError(f"{error} ({retry})") from error
            raise


@contextlib.contextmanager
def explained(config: SourceConfig, where: str, how: str) -> Iterator[None]:
    """Turns errors of libraries into one that names the field of the recipe."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{where}."):
            raise
        raise ValueError(
            f"{where}.path={config.path!r} could not be opened {how}, split {config.split!r}, name {config.name!r}:"
            f" {one_line(error)}"
        ) from error


def _find_on_hub(config: SourceConfig, where: str) -> Found:
    """The files of the split; tars and parquet files are then read like those of any other server."""
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    with explained(config, where, f"as the Hub dataset {config.path!r} (no such local path exists)"):
        builder = load_builder(config)
        files = (builder.config.data_files or {}).get(config.split)
        is_tars, is_parquet = isinstance(builder, WebDataset), isinstance(builder, Parquet)
        if not is_tars and not is_parquet:
            return Found(None, "", [str(file) for file in files or []], [], is_hub=True)
        if files is None:
            raise ValueError(f"it has the splits {', '.join(builder.config.data_files or {})}")
        features = builder.info.features or {}
        types = {name: type(feature).__name__ for name, feature in features.items() if not isinstance(feature, dict)}
        kind = "webdataset" if is_tars else "parquet"
        return Found(kind, "", [str(file) for file in files], [], is_hub=True, types=types)


def load_builder(config: SourceConfig) -> Any:
    """What `datasets` knows about a dataset on the Hub."""
    import datasets

    disable_retries_of_datasets()
    return datasets.load_dataset_builder(config.path, config.name)


def disable_retries_of_datasets() -> None:
    """Turns off the retries of `datasets`, which read further from the failed connection.

    Some file systems then report the end of the file, and the remaining samples of a tar would be lost silently. Here
    the file is opened again instead.
    """
    import datasets

    for action in ("OPEN", "READ"):
        setattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1)
    for pause in ("OPEN_RETRY", "READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_{pause}_INTERVAL", 0)
