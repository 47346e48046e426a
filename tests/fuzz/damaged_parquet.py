"""Pages and footers of parquet files, through the data stream and `count_images`."""

import functools
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from damage import choose, damage
from isolation import Case
from streams import check_count, check_stream, picture, read_all

KINDS = {  # options of the writer; the pages of the last one have checksums
    "plain": {"compression": "none", "use_dictionary": False},
    "snappy": {"compression": "snappy"},
    "zstd": {"compression": "zstd", "row_group_size": 2},
    "checksums": {"compression": "none", "write_page_checksum": True, "use_dictionary": False},
}


def prepare(folder: Path):
    """Two files of five rows each, in a folder of each kind -> their images, by folder."""
    for kind, options in KINDS.items():
        (folder / kind).mkdir()
        for part in range(2):
            rows = [{"bytes": picture(5 * part + row), "path": f"{row}.jpg"} for row in range(5)]
            images = rows if kind != "snappy" else [row["bytes"] for row in rows]
            table = pa.table({"image": images, "caption": ["a picture"] * 5, "width": [24] * 5})
            pq.write_table(table, folder / kind / f"{part}.parquet", **options)
    return {kind: (folder / kind, read_all(folder / kind)[0]) for kind in KINDS}


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    kind = choose(rng, KINDS)
    sound_folder, sound = world[kind]
    assert len(sound) == 10
    shutil.copytree(sound_folder, folder / "data")
    path = choose(rng, sorted((folder / "data").iterdir()))
    data = path.read_bytes()
    footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    in_footer = rng.random() < 0.6
    what, data = damage(rng, data, footer if in_footer else 0, None if in_footer else footer)
    path.write_bytes(data)
    if rng.random() < 0.2:
        run = functools.partial(check_count, folder / "data", len(sound))
        return Case(f"count_images, {kind}/{path.name} (footer at {footer}): {what}", (path.name, "data.path"), run)
    detects = kind == "checksums" and not in_footer
    run = functools.partial(check_stream, folder / "data", sound, detects, 0, (path.name,))
    return Case(f"stream, {kind}/{path.name} (footer at {footer}): {what}", (path.name, "data.path"), run)
