"""Images from parquet files: only their column is read, in the type that each file has for it."""

import bisect
import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .columns import check_type, choose_from_table, declared_types
from .config import SourceConfig
from .errors import FileError, one_line
from .remote import is_url, named, open_local, open_ranges

if TYPE_CHECKING:
    import pyarrow.parquet

# Number of files that are searched for the first one with rows.
FILES_LOOKED_AT = 20
# Rows that are decoded from a file together.
BATCH_ROWS = 64
# How fsspec names files on this machine, also at the end of a chain such as zip://a.jpg::/photos.zip
LOCAL = re.compile(r"^(file|local)://|::((file|local)://|(?!.*://))")


def find_column(files: list[str], config: SourceConfig, where: str, declared: dict[str, str]) -> str:
    """The column that holds the images of the first file with rows.

    Args:
        declared: column -> the type that a dataset's page on the Hub states, e.g. "Image"; may be empty.

    Raises:
        ColumnError: none does, or several; the message says how to choose.
        FileError, OSError: a file cannot be read.
    """
    for file in files[: FILES_LOOKED_AT - 1]:
        with open_parquet(file) as parquet:
            if parquet.metadata.num_rows:
                return _column_of(parquet, config, where, declared)
    with open_parquet(files[:FILES_LOOKED_AT][-1]) as parquet:
        return _column_of(parquet, config, where, declared)


def read_parquet(
    path: str, column: str, config: SourceConfig, where: str, indices: range, root: str
) -> Iterator[tuple[str, Any]]:
    """Yields (number of the row, image as `read_image` takes it) of these rows. Row groups without any are not read.

    Args:
        root: as in `below`.

    Raises:
        ColumnError: the file has neither this column nor exactly one other that may be meant.
        FileError, OSError: the file is damaged, or cannot be read.
    """
    with open_parquet(path) as parquet:
        if column in parquet.schema_arrow.names:
            check_type(parquet.schema_arrow, column, config, where)
        else:
            column = _column_of(parquet, config, where, {})
        first = 0
        for group, rows in enumerate(_group_rows(parquet)):
            if bisect.bisect_left(indices, first) < bisect.bisect_left(indices, first + rows):
                row = first
                for batch in parquet.iter_batches(BATCH_ROWS, [group], [column], use_threads=False):
                    for value in batch.column(column):
                        if row in indices:
                            yield str(row), below(root, value.as_py())
                        row += 1
                if row != first + rows:
                    raise ValueError(f"row group {group} states {rows} rows and holds {row - first}")
            first += rows


def below(root: str, value: Any) -> Any:
    """A record of an image; if it names a file on this machine, the path below `root`, or None if it is outside.

    Args:
        root: a folder. With "" or a URL, no file on this machine may be named.
    """
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
    if not isinstance(path, str) or (is_url(path) and not LOCAL.search(path)):
        return value
    if not root or is_url(root) or "::" in path:
        return None
    path = os.path.normpath(os.path.join(root, LOCAL.sub("", path)))
    return path if path.startswith(os.path.join(root, "")) else None


def count_rows(path: str) -> int:
    with open_parquet(path) as parquet:
        return parquet.metadata.num_rows


def times_read(path: str, parts: int) -> float:
    """How often a file is read if its rows are split into this many even parts: a row group is always read whole."""
    with open_parquet(path) as parquet:
        rows, read, first = parquet.metadata.num_rows, 0, 0
        for size in _group_rows(parquet):
            read += size * sum(
                part * rows // parts < first + size and first < (part + 1) * rows // parts for part in range(parts)
            )
            first += size
    return read / max(1, rows)


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Opens a parquet file for reading.

    Raises:
        FileError: also later, within the block, if what is read proves to be damaged.
        OSError: it cannot be read.
    """
    import pyarrow.parquet

    with named(path), contextlib.ExitStack() as stack:
        if is_url(path):
            file: Any = stack.enter_context(open_ranges(path))
            try:  # without a buffer: one request for a column of a row group
                parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            except ValueError as error:
                if isinstance(error, pyarrow.ArrowException):
                    raise
                raise FileError(
                    f"{path}: {one_line(error)} Parquet files are read in parts: expected a server that states their"
                    " size and answers requests for ranges of bytes. Otherwise download them."
                ) from error
        else:
            open_local(path).close()
            parquet = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
            stack.enter_context(parquet)
        rows = _group_rows(parquet)
        if min(rows, default=0) < 0 or sum(rows) != parquet.metadata.num_rows:
            raise ValueError(f"states {parquet.metadata.num_rows} rows, and {sum(rows)} in its row groups")
        yield parquet


def _group_rows(parquet: "pyarrow.parquet.ParquetFile") -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _column_of(
    parquet: "pyarrow.parquet.ParquetFile", config: SourceConfig, where: str, declared: dict[str, str]
) -> str:
    def first_values(columns: list[str]) -> dict[str, Any]:
        batch = next(parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False), None) if columns else None
        values = {} if batch is None else {name: batch.column(name).drop_null() for name in columns}
        return {name: found[0].as_py() for name, found in values.items() if len(found)}

    schema = parquet.schema_arrow
    return choose_from_table(schema, {**declared_types(schema), **declared}, first_values, config, where)
