"""Summaries of images: encoded in memory, or on disk, where they are encoded once and by any number of processes.

A store is a folder:
  store.json                  what the summaries depend on; a store of anything else is not continued
  00007-00002.safetensors     block 2 of part 7 of the split: "summaries" (n, D) and "labels" (n,)
  00007.json                  part 7 has been read to its end and has this many blocks
"""

import itertools
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb
from transformers_radio.disk import differences, replace_whole, write_json, writing
from transformers_radio.evaluation.processes import process_state
from transformers_radio.precision import DTYPES

from .labeled import COUNTED, LabeledSplit, check_readable
from .resize import cover_image, resize_shortest

logger = logging.getLogger(__name__)

Encode = Callable[[torch.Tensor], torch.Tensor]  # float images in [0, 1], (B, 3, H, W) -> summaries (B, D)
ImageSize = int | tuple[int, int]
# What summaries are known by: the weights and outputs of the encoder, the images and their sizes.
STORE_COUNTED = (
    *(f"encoder.{name}" for name in ("weights", "dtype", "summary", "features", "adaptor", "output")),
    *(f"data.{name}" for name in COUNTED),
    *("image_size", "step", "dtype", "block_images"),
)


@torch.no_grad()
def extract_summaries(
    encode: Encode,
    images: torch.Tensor | Sequence[torch.Tensor],
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    description: str = "summaries",
) -> torch.Tensor:
    """Encodes all images, in order; returns float32 (N, D) on the CPU.

    Args:
        encode: float images in [0, 1], (B, 3, H, W), on `device` -> summaries (B, D).
        images: uint8 (N, 3, H, W), or a sized sequence of uint8 batches (B, 3, H, W), whose sizes may differ
            (`batch_size` is then not used).

    Raises:
        ValueError: no images, images that are not uint8 (B, 3, H, W), or an encoder whose output is not finite (B, D).
    """
    if len(images) == 0:
        raise ValueError("There are no images to encode; expected at least one.")
    batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
    summaries = []
    for batch in tqdm(batches, desc=description, unit="batch"):
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"A batch is {batch.dtype} {tuple(batch.shape)}; expected torch.uint8 (B, 3, H, W).")
        summaries.append(_encode_images(encode, batch, device))
    return torch.cat(summaries)


@torch.no_grad()
def _encode_images(
    encode: Encode, images: torch.Tensor, device: str | torch.device, dtype: str = "float32"
) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> summaries (B, D) in this dtype, on the CPU. ValueError unless they are finite (B, D)."""
    outputs = encode(images.to(device).float() / 255)
    if outputs.ndim != 2 or len(outputs) != len(images):
        raise ValueError(f"encode returned {tuple(outputs.shape)}; expected ({len(images)}, D): one row per image.")
    outputs = outputs.to(DTYPES[dtype]).cpu()
    if not outputs.isfinite().all():
        raise ValueError(
            f"encode returned NaN or infinite summaries (as {dtype}); check the weights, or use a wider dtype for the "
            "model or the store."
        )
    return outputs


@dataclass
class StoreConfig:
    """How a split is encoded.

    Attributes:
        image_size: in pixels. (height, width) to scale an image until it covers them and cut out the center; one
            number for its shortest side, the aspect ratio kept.
        step: sides are rounded to multiples of it where `image_size` is one number.
        dtype: of the summaries on disk.
        batch_size: images of one size that are encoded together.
        num_workers: threads that read and decode.
        block_images: images per file; a kill loses at most this many in each process.
    """

    image_size: ImageSize
    step: int = 1
    dtype: str = "float32"
    batch_size: int = 64
    num_workers: int = 4
    block_images: int = 1024

    def check(self) -> None:
        """Raises ValueError that names the field, its value and the fix."""
        sides = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(
                f"image_size is {self.image_size!r}; expected the shortest side or (height, width), in whole pixels."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"The dtype of the store is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        for name in ("step", "batch_size", "num_workers", "block_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")

    @property
    def protocol(self) -> str:
        """How images are resized, for the protocol line of results."""
        if isinstance(self.image_size, int):
            return f"shortest side {self.image_size} px, aspect ratio kept"
        return f"{self.image_size[0]} x {self.image_size[1]} px, scaled to cover, center cut out"


class SummaryStore:
    """A finished store.

    Attributes:
        files: the blocks, in order.
        labels: int64 (N,), in the order of the summaries.
        dim: width of the summaries.
        skipped: reason -> number of images that could not be used.
    """

    def __init__(self, folder: Path):
        parts = sorted(folder.glob("[0-9]*.json"))
        self.files = [path for part in parts for path in _block_paths(part)]
        self.labels = torch.empty(0, dtype=torch.int64)
        self.dim, skipped, labels = 0, Counter[str](), []
        for path in self.files:
            with safe_open(path, "pt") as file:
                labels.append(file.get_tensor("labels"))
                self.dim = max(self.dim, file.get_slice("summaries").get_shape()[1])  # 0 without a readable image
                skipped.update(json.loads(file.metadata()["skipped"]))
        if labels:
            self.labels = torch.cat(labels)
        self.skipped = dict(skipped)

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields (summaries (n, D) in the dtype of the store, labels (n,)), in order, n at most `rows`."""
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        count = 0
        for path in self.files:
            tensors = load_file(path)
            if not len(tensors["labels"]):
                continue
            for piece in zip(tensors["summaries"].split(rows), tensors["labels"].split(rows), strict=True):
                if count + len(piece[1]) > rows:
                    yield torch.cat([summaries for summaries, _ in held]), torch.cat([labels for _, labels in held])
                    held, count = [], 0
                held.append(piece)
                count += len(piece[1])
        if held:
            yield torch.cat([summaries for summaries, _ in held]), torch.cat([labels for _, labels in held])


@dataclass(frozen=True)
class _Job:
    """What `store_summaries` encodes, how, and where to."""

    folder: Path
    encode: Encode
    split: LabeledSplit
    config: StoreConfig


def store_summaries(
    folder: Path,
    encode: Encode,
    encoder_settings: dict[str, Any],
    split: LabeledSplit,
    config: StoreConfig,
    description: str = "summaries",
) -> SummaryStore:
    """Encodes what is not in the folder yet, and opens the store.

    Runs alone or on every process of `accelerate launch`, on one shared disk: parts of the split, or blocks where
    there are fewer parts than processes, are dealt out to the processes. A block holds the same images in the same
    batches whatever the number of processes, so the store has the same bits; also when a killed call is repeated,
    with any number of processes.

    Args:
        encode: float images in [0, 1], (B, 3, H, W), on Accelerate's device -> summaries (B, D).
        encoder_settings: all that the summaries depend on besides the images; JSON-able.

    Raises:
        ValueError: the folder holds a store of something else; nothing readable in the split, or fewer images than it
            should have; labels that are not classes; an encoder whose output is not finite (B, D).
        OSError: not enough room on the disk.
    """
    config.check()
    state = process_state()
    job = _Job(folder, encode, split, config)
    settings = _settings(encoder_settings, split, config)
    _check_settings(folder, settings, split)
    state.wait_for_everyone()  # all have looked before one writes
    parts = [part for part in range(split.num_shards) if not _is_finished(folder, part)]
    if parts:
        known = split.count() if state.is_main_process else None
        if state.is_main_process:
            _check_disk(job, known)
            write_json(folder / "store.json", settings)
        state.wait_for_everyone()
        _encode_parts(job, parts, known, description)
        state.wait_for_everyone()
    store = SummaryStore(folder)
    read = len(store) + sum(store.skipped.values())
    if split.stated is not None and read != split.stated:
        raise ValueError(
            f"{split.source} ({split.split}) should hold {split.stated} images, but {read} were read: the source "
            f"broke off, or was changed. Delete {folder} and run the same command again."
        )
    check_readable(split, len(store), store.skipped, quiet=not (parts and state.is_main_process))
    return store


def _settings(encoder_settings: dict[str, Any], split: LabeledSplit, config: StoreConfig) -> dict[str, Any]:
    """What the summaries depend on, as store.json has it."""
    return {
        "encoder": encoder_settings,
        "data": split.fingerprint(),
        "image_size": config.image_size,
        "step": config.step if isinstance(config.image_size, int) else None,
        "dtype": config.dtype,
        "block_images": config.block_images,
    }


def _encode_parts(job: _Job, parts: list[int], known: int | None, description: str) -> None:
    """Encodes this process's share of these parts.

    Args:
        known: number of images of the whole split, for the progress bar; None where it is not known.
    """
    state = PartialState()
    rank, processes = state.process_index, state.num_processes
    split, config = job.split, job.config
    by_part = split.num_shards >= processes
    if by_part:
        parts = [part for part in parts if part % processes == rank]
    total = None if known is None else known * len(parts) // split.num_shards
    progress = tqdm(desc=description, unit="image", total=total, disable=not state.is_main_process)
    with ThreadPoolExecutor(config.num_workers) as threads, progress:
        for part in parts:
            rows = split.rows(part)
            for block in itertools.count():
                chunk = list(itertools.islice(rows, config.block_images))
                if not chunk:
                    break
                path = job.folder / f"{part:05d}-{block:05d}.safetensors"
                if (by_part or (part + block) % processes == rank) and not path.exists():
                    _encode_block(path, chunk, job, threads, progress)
                else:
                    progress.update(len(chunk))
            if by_part or state.is_main_process:  # a part without all its blocks is not finished, whatever this says
                write_json(job.folder / f"{part:05d}.json", {"blocks": block})


def _encode_block(
    path: Path, rows: Sequence[tuple[Any, int]], job: _Job, threads: ThreadPoolExecutor, progress: tqdm
) -> None:
    """Writes the summaries of the readable images among `rows`, in their order."""
    config, size = job.config, job.config.image_size
    waiting: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}  # images of one size until they fill a batch
    summaries: dict[int, torch.Tensor] = {}  # row -> (D,)
    skipped: Counter[str] = Counter()

    def encode_batch(batch: list[tuple[int, torch.Tensor]]) -> None:
        images = torch.stack([image for _, image in batch])
        outputs = _encode_images(job.encode, images, PartialState().device, config.dtype)
        summaries.update(zip((row for row, _ in batch), outputs, strict=True))

    def prepare(row: tuple[Any, int]) -> torch.Tensor | str:
        try:
            image = read_rgb(row[0])
        except SkippedImage as error:
            return error.reason
        return resize_shortest(image, size, config.step) if isinstance(size, int) else cover_image(image, size)

    for row, image in enumerate(_ahead(threads, prepare, rows, 2 * config.batch_size)):
        progress.update()
        if isinstance(image, str):
            skipped[image] += 1
            continue
        batch = waiting.setdefault(image.shape, [])
        batch.append((row, image))
        if len(batch) == config.batch_size:
            encode_batch(waiting.pop(image.shape))
    for batch in waiting.values():
        encode_batch(batch)
    used = sorted(summaries)
    tensors = {
        "summaries": torch.stack([summaries[row] for row in used]) if used else torch.empty(0, 0),
        "labels": torch.tensor([rows[row][1] for row in used], dtype=torch.int64),
    }
    with writing(path, also=(SafetensorError,)), replace_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"skipped": json.dumps(skipped)})


def _ahead(threads: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[Any]:
    """`map` in threads that are never more than `ahead` results ahead, so that few decoded images are in memory."""
    running: deque = deque()
    for item in items:
        running.append(threads.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _check_settings(folder: Path, settings: dict[str, Any], split: LabeledSplit) -> None:
    """ValueError if the folder holds a store of other settings."""
    if not (folder / "store.json").exists():
        return
    there = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    there["data"] = split.recognized(there["data"])
    changed = differences(there, settings, STORE_COUNTED)
    if changed:
        raise ValueError(
            f"{folder} holds summaries of something else; they differ in {', '.join(changed)}. Choose another "
            "--output, or replace them with overwrite=true."
        )


def _check_disk(job: _Job, known: int | None) -> None:
    """Makes the folder. OSError unless the summaries that are missing fit on its disk, where their number is known."""
    folder, size, dtype = job.folder, job.config.image_size, job.config.dtype
    folder.mkdir(parents=True, exist_ok=True)
    height, width = (size, size) if isinstance(size, int) else size
    black = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    summary = _encode_images(job.encode, black, PartialState().device, dtype)
    row_bytes = summary.shape[1] * summary.element_size() + 8  # and an int64 label
    free = shutil.disk_usage(folder).free
    if known is None:
        logger.info("%s: %d bytes per image; the number of images is not known beforehand", folder, row_bytes)
        return
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    need = max(0, known * row_bytes - there)
    logger.info("%s: %d images need %.2f GB; %.1f GB are free", folder, known, need / 1e9, free / 1e9)
    if need > free:
        raise OSError(
            f"The summaries of {known} images ({summary.shape[1]} wide, {dtype}) need {need / 1e9:.2f} GB more, but "
            f"{folder} has {free / 1e9:.2f} GB free. Choose another --output, or a narrower dtype of the store."
        )


def _is_finished(folder: Path, part: int) -> bool:
    path = folder / f"{part:05d}.json"
    return path.exists() and all(block.exists() for block in _block_paths(path))


def _block_paths(part: Path) -> list[Path]:
    """The blocks of a part, given its JSON file."""
    blocks = json.loads(part.read_text(encoding="utf-8"))["blocks"]
    return [part.with_name(f"{part.stem}-{block:05d}.safetensors") for block in range(blocks)]
