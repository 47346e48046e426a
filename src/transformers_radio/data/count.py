"""How many images there are, from the names of files and from headers."""

import os
import tarfile
from collections.abc import Iterable

from tqdm.auto import tqdm

from .config import DataConfig
from .files import find_files
from .source import Source


def count_images(config: DataConfig) -> int:
    """The images of all data sets together, usable or not. With progress.

    Of local folders and parquet files it is known at once, of local tars only the headers are read. A server's tars
    and datasets are read through.
    """
    import pyarrow.parquet

    count = 0
    with tqdm(desc="counting images", unit="image", dynamic_ncols=True) as progress:
        for name, one in config.named_sources().items():
            where = f"data.sources.{name}" if name else "data"
            kind, _, files, _ = find_files(os.path.expanduser(one.path), one.split, where)
            parts: Iterable[int]
            if kind is None or "://" in one.path:
                source = Source(one, name, config.retry_seconds)
                parts = (1 for shard in range(len(source.shards)) for _ in source.records(shard))
            elif kind == "imagefolder":
                parts = [len(files)]
            elif kind == "parquet":
                parts = (pyarrow.parquet.read_metadata(file).num_rows for file in files)
            else:
                parts = map(_count_samples, files)
            for part in parts:
                count += part
                progress.update(part)
    return count


def _count_samples(tar_path: str) -> int:
    """Members that have the name up to its first dot in common are a sample."""
    with tarfile.open(tar_path) as tar:
        names = [member.name.rpartition("/") for member in tar if member.isfile()]
    return len({(folder, name.partition(".")[0]) for folder, _, name in names if "." in name[1:]})
