"""How many images there are, from the names of files and from headers."""

from collections.abc import Iterable

from tqdm.auto import tqdm

from .config import DataConfig
from .source import Source
from .tars import count_samples


def count_images(config: DataConfig) -> int:
    """The number of images in all data sets together, usable or not, with a progress bar.

    It is known at once for folders and parquet files. Of local tars, only the headers are read; tars on a server are
    read from beginning to end.
    """
    count = 0
    with tqdm(desc="counting images", unit="image", dynamic_ncols=True) as progress:
        for name, one in config.named_sources().items():
            for part in _parts(Source(one, name, config.retry_seconds)):
                count += part
                progress.update(part)
    return count


def _parts(source: Source) -> Iterable[int]:
    if source.kind == "imagefolder":
        return [len(source.files)]
    if source.kind == "parquet":
        return map(source.row_count, range(len(source.shards)))
    if source.kind == "webdataset" and not source.is_remote:
        return map(count_samples, source.files)
    return (1 for shard in range(len(source.shards)) for _ in source.records(shard))
