"""Summaries of a labelled split on disk, encoded once and by any number of processes.

folder/
  store.json                  what the summaries depend on; a store of anything else is not continued
  00007-00002.safetensors     block 2 of part 7 of the split: "summaries" (n, D) and "labels" (n,)
  00007.json                  part 7 has been read to its end and has so many blocks
"""

import itertools
import json
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import read_image
from transformers_radio.evaluation.processes import process_state
from transformers_radio.evaluation.result import differences
from transformers_radio.precision import DTYPES

from .labelled import COUNTED, LabelledSplit, resize_image, resize_shortest, warn_of_skipped

logger = logging.getLogger(__name__)

ImageSize = int | tuple[int, int]
# What summaries are known by: the weights and outputs of the encoder, the images and their sizes.
STORE_COUNTED = (
    *(f"encoder.{name}" for name in ("weights", "dtype", "summary", "features", "adaptor", "output")),
    *(f"data.{name}" for name in COUNTED),
    *("image_size", "step", "dtype", "block_images"),
)


@dataclass
class StoreConfig:
    """How a split is encoded.

    image_size: (height, width) to scale an image until it covers them and cut out the centre; one number for its
        shortest side, the aspect ratio kept. step: what sides are rounded to in the second case.
    dtype: of the summaries on disk.
    batch_size: images of one size that are encoded together. num_workers: threads that read and decode.
    block_images: images a file; a kill loses at most this many in each process.
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
        if isinstance(self.image_size, int):
            return f"shortest side {self.image_size} px, aspect ratio kept"
        return f"{self.image_size[0]} x {self.image_size[1]} px, scaled to cover, centre cut out"


class SummaryStore:
    """A finished store.

    Attributes:
        labels: int64 (N,), of the summaries in their order.
        dim: width of the summaries.
        skipped: images that could not be used, per reason.
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
        """(summaries (n, D) in the dtype of the store, labels (n,)), in order, n at most `rows`."""
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


def store_summaries(
    folder: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    encoder_settings: dict[str, Any],
    split: LabelledSplit,
    config: StoreConfig,
    description: str = "summaries",
) -> SummaryStore:
    """Encodes what is not in the folder yet, and opens the store.

    Alone or on every process of `accelerate launch`, on one shared disk: parts of the split, or blocks where there
    are fewer parts than processes, are dealt out to the processes. A block holds the same images in the same batches
    whatever their number, so the store has the same bits; also when it was killed and called again, with any number
    of processes.

    Args:
        encode: float images in [0, 1], (B, 3, H, W), on Accelerate's device -> summaries (B, D).
        encoder_settings: all that the summaries depend on besides the images; JSON-able.

    Raises:
        ValueError: the folder holds a store of something else; nothing readable in the split, or fewer images than it
            should have; labels that are no classes; an encoder whose output is not finite (B, D).
        OSError: not enough room on the disk.
    """
    config.check()
    state = process_state()
    settings = {
        "encoder": encoder_settings,
        "data": split.fingerprint(),
        "image_size": config.image_size,
        "step": config.step if isinstance(config.image_size, int) else None,
        "dtype": config.dtype,
        "block_images": config.block_images,
    }
    settings = json.loads(json.dumps(settings))  # as the file gives it back: no tuples
    _check_settings(folder, settings, split)
    state.wait_for_everyone()  # all have looked before one writes
    parts = [part for part in range(split.num_shards) if not _is_finished(folder, part)]
    if parts:
        known = split.count() if state.is_main_process else None
        if state.is_main_process:
            _check_disk(folder, encode, config, known, state.device)
            _write_json(folder / "store.json", settings)
        state.wait_for_everyone()
        _encode_parts(folder, encode, split, config, parts, known, description)
        state.wait_for_everyone()
    store = SummaryStore(folder)
    read = len(store) + sum(store.skipped.values())
    if split.stated is not None and read != split.stated:
        raise ValueError(
            f"{split.source} ({split.split}) should hold {split.stated} images, but {read} were read: the source "
            f"broke off, or was changed. Delete {folder} and run the same command again."
        )
    if not len(store):
        raise ValueError(
            f"{split.source} ({split.split}) holds no readable image in column {split.image_column!r}; skipped: "
            f"{store.skipped}."
        )
    if parts and state.is_main_process:
        warn_of_skipped(f"{split.source} ({split.split})", len(store), store.skipped)
    return store


def _encode_parts(
    folder: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    split: LabelledSplit,
    config: StoreConfig,
    parts: list[int],
    known: int | None,
    description: str,
) -> None:
    state = PartialState()
    rank, processes = state.process_index, state.num_processes
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
                path = folder / f"{part:05d}-{block:05d}.safetensors"
                if (by_part or (part + block) % processes == rank) and not path.exists():
                    _encode_block(path, encode, chunk, config, threads, state.device, progress)
                else:
                    progress.update(len(chunk))
            _write_json(folder / f"{part:05d}.json", {"blocks": block})


def _encode_block(
    path: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Sequence[tuple[Any, int]],
    config: StoreConfig,
    threads: ThreadPoolExecutor,
    device: torch.device,
    progress: tqdm,
) -> None:
    """Writes the summaries of the readable images among `rows`, in their order."""
    size = config.image_size
    waiting: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}  # images of one size until they fill a batch
    summaries: dict[int, torch.Tensor] = {}  # row -> (D,)
    skipped: Counter[str] = Counter()

    def encode_batch(batch: list[tuple[int, torch.Tensor]]) -> None:
        images = torch.stack([image for _, image in batch])
        outputs = _encode_images(encode, images, config.dtype, device)
        summaries.update(zip((row for row, _ in batch), outputs, strict=True))

    def prepare(row: tuple[Any, int]) -> torch.Tensor | str:
        try:
            image = decode_rgb(read_image(row[0]))
        except SkippedImage as error:
            return error.reason
        return resize_shortest(image, size, config.step) if isinstance(size, int) else resize_image(image, size)

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
    temporary = _temporary(path)
    try:
        save_file(tensors, temporary, metadata={"skipped": json.dumps(skipped)})
        os.replace(temporary, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"Summaries could not be written to {path.parent} ({error}). Make room on the disk and run the same "
            "command again: what is there is kept."
        ) from error


def _encode_images(
    encode: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, dtype: str, device: torch.device
) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> (B, D) in the dtype of the store, on the CPU."""
    with torch.no_grad():
        outputs = encode(images.to(device).float() / 255)
    if outputs.ndim != 2 or len(outputs) != len(images):
        raise ValueError(f"encode returned {tuple(outputs.shape)}; expected ({len(images)}, D): one row an image.")
    outputs = outputs.to(DTYPES[dtype]).cpu()
    if not outputs.isfinite().all():
        raise ValueError(
            f"There are NaN or infinite summaries (as {dtype}); check the weights, or use a wider dtype for the model "
            "or the store."
        )
    return outputs


def _ahead(threads: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[Any]:
    """`map` in threads that are never more than `ahead` results ahead, so that few decoded images are in memory."""
    running: deque = deque()
    for item in items:
        running.append(threads.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _check_settings(folder: Path, settings: dict[str, Any], split: LabelledSplit) -> None:
    """ValueError unless the folder is free or holds a store of these settings."""
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


def _check_disk(
    folder: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    config: StoreConfig,
    known: int | None,
    device: torch.device,
) -> None:
    """Makes the folder. OSError unless the rest of the summaries fits on its disk, where their number is known."""
    folder.mkdir(parents=True, exist_ok=True)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    summary = _encode_images(encode, torch.zeros(1, 3, height, width, dtype=torch.uint8), config.dtype, device)
    row_bytes = summary.shape[1] * summary.element_size() + 8  # and an int64 label
    free = shutil.disk_usage(folder).free
    if known is None:
        logger.info("%s: %d bytes an image, and the number of images is not known beforehand", folder, row_bytes)
        return
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    need = max(0, known * row_bytes - there)
    logger.info("%s: %d images need %.2f GB, of %.1f GB free", folder, known, need / 1e9, free / 1e9)
    if need > free:
        raise OSError(
            f"The summaries of {known} images ({summary.shape[1]} wide, {config.dtype}) need {need / 1e9:.2f} GB "
            f"more, but {folder} has {free / 1e9:.2f} GB free. Choose another --output, or a narrower dtype of the "
            "store."
        )


def _is_finished(folder: Path, part: int) -> bool:
    path = folder / f"{part:05d}.json"
    return path.exists() and all(block.exists() for block in _block_paths(path))


def _block_paths(part: Path) -> list[Path]:
    blocks = json.loads(part.read_text(encoding="utf-8"))["blocks"]
    return [part.with_name(f"{part.stem}-{block:05d}.safetensors") for block in range(blocks)]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = _temporary(path)
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{PartialState().process_index}.tmp")
