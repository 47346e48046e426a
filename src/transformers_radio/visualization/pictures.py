"""A few images to look at, with their boxes where the data has some."""

import glob
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_radio.data.files import kind_of
from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb
from transformers_radio.evaluation.images.labeled import IMAGE_COLUMNS
from transformers_radio.evaluation.images.split_files import find_split, load_builder
from transformers_radio.evaluation.paths import expand_home

logger = logging.getLogger(__name__)


@dataclass
class Picture:
    """An image to look at."""

    name: str
    image: Image.Image  # RGB, of any size
    boxes: list[list[float]] = field(default_factory=list)  # x0, y0, x1, y1 in pixels, the largest first


def load_pictures(
    data: str | None, count: int, split: str = "validation", image_column: str | None = None
) -> list[Picture]:
    """The first `count` readable images, decoded as training decodes; warnings name the unreadable ones.

    Args:
        data: an image file; a folder with image files in it, in the order of their names; or what
            `datasets.load_dataset` opens: WebDataset tars, class folders, Parquet, a Hub id. A `json` column with
            `{"objects": [{"box": [x0, y0, x1, y1]}]}`, as the quickstart's scenes have it, gives the boxes.
        count: at least 1; all if there are fewer.
        split, image_column: used if the data is a dataset.

    Raises:
        ValueError: no data, no image column, no readable image.
        OSError: no such file, folder or dataset.
    """
    if not data:
        raise ValueError("There are no images to show: name an image, a folder or a dataset with --data.")
    if count < 1:
        raise ValueError(f"images is {count}; expected at least 1.")
    path = Path(expand_home(data))
    if path.is_file() and _is_image(path):
        samples: Iterator[tuple[str, Any, list[list[float]]]] = iter([(path.name, str(path), [])])
    elif path.is_dir() and (files := sorted(filter(_is_image, path.iterdir()))):
        samples = ((file.name, str(file), []) for file in files)
    else:
        samples = _dataset_samples(str(path) if path.exists() else data, split, image_column)
    pictures: list[Picture] = []
    for name, value, boxes in samples:
        try:
            pictures.append(Picture(name, read_rgb(value), boxes))
        except SkippedImage as error:
            logger.warning("%s of %s is left out: %s", name, data, error.reason)
        if len(pictures) == count:
            break
    if not pictures:
        raise ValueError(f"{data} holds no readable image.")
    return pictures


def _is_image(path: Path) -> bool:
    return kind_of(path.name) == "imagefolder" and not path.name.startswith(".")


def _dataset_samples(data: str, split: str, image_column: str | None) -> Iterator[tuple[str, Any, list[list[float]]]]:
    is_pattern = glob.has_magic(data) and not os.path.exists(expand_home(data))
    found = find_split(data, "train" if is_pattern and kind_of(data) == "imagefolder" else split)
    if found.kind == "imagefolder":
        for file in filter(_is_image, map(Path, found.files)):
            yield str(file.relative_to(found.folder)), str(file), []
        return
    import datasets

    stream = load_builder(found, None).as_streaming_dataset(split=split)
    columns = list(stream.features or next(iter(stream)))
    candidates = IMAGE_COLUMNS if image_column is None else (image_column,)
    column = next((one for one in candidates if one in columns), None)
    if column is None:
        raise ValueError(
            f"{data} has no image column among {list(candidates)}; it has {columns}. Name one with image_column."
        )
    # undecoded, so that one broken file is one image left out
    for number, sample in enumerate(stream.cast_column(column, datasets.Image(decode=False))):
        about = sample.get("json")
        objects = about.get("objects", []) if isinstance(about, dict) else []
        boxes = [list(map(float, one["box"])) for one in objects if "box" in one]
        boxes.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), reverse=True)
        yield str(sample.get("__key__", f"image {number}")), sample[column], boxes
