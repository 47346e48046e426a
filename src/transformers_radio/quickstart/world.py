"""The synthetic scenes on disk: WebDataset shards, written once and reused while they are whole."""

import io
import json
import multiprocessing
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from transformers_radio.disk import lock_folder, replace_whole

from .scenes import CLASS_NAMES, MATERIALS, PHOTOGRAPHS, SHAPES, Scene, draw_scene

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["CLASS_NAMES", "MATERIALS", "SHAPES", "World", "make_world", "read_split"]

# Raise it whenever scenes or files come out differently, so that those of an older version are made again.
SPEC_VERSION = 1
SHARDS = {"train": 8, "validation": 2}
SHARD_NUMBER = "[0-9]" * 6  # as a file pattern
INDEX_FILE = "world.json"


@dataclass(frozen=True)
class World:
    """A complete set of synthetic scenes.

    Attributes:
        directory: where train-000000.tar, ..., validation-000000.tar, ... and world.json are.
        classes: the 96 names of the main classes, e.g. "striped star", in the order of the class numbers.
        train: number of training scenes.
        validation: number of validation scenes.
        seed: that the scenes were made with.
    """

    directory: Path
    classes: tuple[str, ...]
    train: int
    validation: int
    seed: int


@dataclass(frozen=True)
class _Shard:
    directory: Path
    split: str
    number: int
    start: int  # the first scene's index within the split
    stop: int
    seed: int

    @property
    def path(self) -> Path:
        return self.directory / f"{self.split}-{self.number:06d}.tar"


def _encode(array: np.ndarray, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format, **options)
    return buffer.getvalue()


def _sample_files(scene: Scene) -> dict[str, bytes]:
    """One scene as the files of a WebDataset sample, keyed by extension."""
    return {
        "jpg": _encode(scene.image, "JPEG", quality=95),
        "txt": scene.caption.encode(),
        "cls": str(scene.main_class).encode(),
        "semantic.png": _encode(scene.semantic, "PNG", compress_level=3),
        "instances.png": _encode(scene.instances, "PNG", compress_level=3),
        "json": json.dumps({"objects": [asdict(o) for o in scene.objects]}).encode(),
    }


def _write_shard(shard: _Shard) -> tuple[str, int, int]:
    """Writes one shard, whole. Returns its name, its size in bytes and its number of scenes."""
    with replace_whole(shard.path, unique=True) as temporary, tarfile.open(temporary, "w") as tar:
        for index in range(shard.start, shard.stop):
            for extension, content in _sample_files(draw_scene(shard.split, shard.seed, index)).items():
                member = tarfile.TarInfo(f"{shard.split}-{index:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return shard.path.name, shard.path.stat().st_size, shard.stop - shard.start


def _split_shards(directory: Path, split: str, count: int, seed: int) -> list[_Shard]:
    bounds = [count * i // SHARDS[split] for i in range(SHARDS[split] + 1)]
    return [_Shard(directory, split, i, bounds[i], bounds[i + 1], seed) for i in range(SHARDS[split])]


def _is_whole(directory: Path, spec: dict[str, Any]) -> bool:
    """Whether the directory holds exactly these scenes: the index is written last, and has the size of each shard."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        sizes = index.pop("bytes")
        return index == spec and all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def make_world(directory: Path, train: int = 8000, validation: int = 1600, seed: int = 0, workers: int = 2) -> World:
    """Makes the scenes in `directory`, or reuses those that are there if they are whole and the same.

    The files depend only on the counts and the seed, not on the number of workers. Unfinished or different scenes in
    the directory are replaced; other files there are left alone.

    Args:
        directory: created if missing.
        train: number of training scenes, at least 8, one for each shard.
        validation: number of validation scenes, at least 2.
        seed: not negative.
        workers: number of processes, at least 1; each is started afresh ("spawn").

    Raises:
        ValueError: a count, the seed or the number of workers is too small.
        FileNotFoundError: a photograph is not installed.
        OSError: another process draws scenes there.
    """
    counts = {"train": train, "validation": validation}
    for split, count in counts.items():
        if count < SHARDS[split]:
            raise ValueError(f"{split} is {count} scenes; expected at least {SHARDS[split]}, one for each shard")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed is {seed} and workers is {workers}; expected seed >= 0 and workers >= 1")
    directory = Path(directory)
    world = World(directory, CLASS_NAMES, train, validation, seed)
    spec: dict[str, Any] = {
        "version": SPEC_VERSION,
        "seed": seed,
        "counts": counts,
        "shards": SHARDS,
        "classes": list(CLASS_NAMES),
        "photographs": {split: list(names) for split, names in PHOTOGRAPHS.items()},
    }
    if _is_whole(directory, spec):
        return world

    with lock_folder(directory, f"another process draws scenes in {directory}: wait for it, or choose another folder"):
        if not _is_whole(directory, spec):  # another process may just have finished
            _draw(world, spec, workers)
    return world


def _draw(world: World, spec: dict[str, Any], workers: int) -> None:
    """Draws all scenes, in place of what is there of them."""
    directory = world.directory
    own = [INDEX_FILE, *(f"{split}-{SHARD_NUMBER}.tar" for split in SHARDS)]
    for pattern in [*own, *(f".{name}.*.tmp" for name in own)]:
        for leftover in directory.glob(pattern):
            leftover.unlink()
    counts = spec["counts"]
    shards = [shard for split, count in counts.items() for shard in _split_shards(directory, split, count, world.seed)]
    sizes = {}
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        tqdm(total=sum(counts.values()), desc="drawing scenes", unit="scene") as progress,
    ):
        for name, size, scenes in pool.imap_unordered(_write_shard, shards):
            sizes[name] = size
            progress.update(scenes)
    with replace_whole(directory / INDEX_FILE, unique=True) as temporary:  # as the shards
        temporary.write_text(json.dumps({**spec, "bytes": dict(sorted(sizes.items()))}, indent=2), encoding="utf-8")


def read_split(directory: Path, split: str, columns: Sequence[str] | None = None) -> "IterableDataset":
    """Streams the samples of one split, in order.

    Args:
        split: "train" or "validation".
        columns: read only these; by default all of "jpg" (RGB image), "txt" (caption), "cls" (main class),
            "semantic.png" and "instances.png" (gray images of integers), "json" ({"objects": [...]}), "__key__".

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: the directory holds no shards of the split.
    """
    if split not in SHARDS:
        raise ValueError(f"split is {split!r}; expected one of {tuple(SHARDS)}")
    shards = sorted(str(path) for path in Path(directory).glob(f"{split}-{SHARD_NUMBER}.tar"))
    if not shards:
        raise FileNotFoundError(f"no {split}-*.tar in {directory}; make the scenes with make_world(directory)")
    from datasets import load_dataset

    dataset = load_dataset("webdataset", data_files={split: shards}, split=split, streaming=True)
    return dataset.select_columns(list(columns)) if columns else dataset
