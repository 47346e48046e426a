"""Teachers' outputs on disk: with the same crop in every epoch, an image is encoded once and read from then on.

folder/<teacher>-<largest side>/
  fingerprint.json                  what the outputs depend on; a cache with another one is refused
  000002/                           what the third flush added
    00000-000007.safetensors        shard 7 of process 0: outputs for some images in bf16, their keys and checksums
  pending.tmp/                      shards since the last flush
"""

import json
import logging
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transformers_radio.data import DataConfig, one_line
from transformers_radio.disk import differences, existing, lock_folder, remove, write_json, writing
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training.run.processes import on_main_process

from .recipe import TeacherRecipe
from .student import TeacherShape

logger = logging.getLogger(__name__)

# How far the mean of an image's pixels in [0, 1] may be from its value when the image was encoded: decoders differ by
# less; other images and other crops mostly by more.
MEAN_TOLERANCE = 1 / 255


class TeacherCache:
    """The outputs of one teacher by image, on one of the processes that it serves.

    What `targets` returns is rounded to bf16 even when it comes straight from the teacher, so that a run's targets do
    not depend on what was cached. Nor do they after a kill, although the last bits of an output depend on the other
    images of its batch: what a kill loses is computed again in the same batches (see `TeacherCaches.flush`).

    Args:
        folder: the cache's.
        rank: this process's.
        shard_bytes: a shard ends with the batch that fills it; this much is held in memory.
    """

    def __init__(self, folder: Path, rank: int, shard_bytes: int = 256 << 20):
        self.folder, self.writer, self.shard_bytes = folder, f"{rank:05d}", shard_bytes
        self._recent: dict[str, dict[str, torch.Tensor]] = {}  # key -> outputs that are not in a shard yet
        self._index: dict[str, tuple[str, int]] = {}  # key -> (shard, row)
        self._paths: dict[str, Path] = {}  # shard -> where it is now
        self._grid = (0, 0)
        self.refresh()

    def targets(self, keys: list[str], images: torch.Tensor, teacher: Teacher) -> TeacherOutput:
        """The teacher's outputs for a batch, rounded to bf16, in float32 and on the images' device.

        Args:
            keys: the images' names; an image that is in the batch twice is encoded once.
            images: (B, 3, side, side) in [0, 1]. The new ones run through the teacher together.

        Raises:
            ValueError: an image is not the one that was encoded under its name; its outputs are damaged on the disk.
            OSError: a shard could not be written.
        """
        means = images.mean(dim=(1, 2, 3)).cpu()  # (B, 3, side, side) -> (B,)
        rows = {key: row for row, key in reversed(list(enumerate(keys)))}  # the first of each key
        new = sorted(row for key, row in rows.items() if key not in self._recent and key not in self._index)
        if new:
            self._encode([keys[row] for row in new], images[new], means[new], teacher)
        outputs = self._read(keys)
        for key, output, mean in zip(keys, outputs, means, strict=True):
            if not abs(output["mean"] - mean) <= MEAN_TOLERANCE:
                raise ValueError(
                    f"{key} is not the image whose outputs {self.folder} holds under this name (mean {mean:.4f}, was "
                    f"{output['mean']:.4f}): two images have one name, it was replaced, or its crop is not the same "
                    "in every epoch. Set data.frozen_crops=true, repair the data, or delete the folder"
                )
        batch = {name: torch.stack([output[name] for output in outputs]).to(images.device) for name in outputs[0]}
        summary = batch["summary"].float() if "summary" in batch else None
        return TeacherOutput(summary, batch["features"].float(), self._grid)

    def write(self) -> None:
        """Writes the outputs in memory as a shard, which becomes valid with the next flush."""
        if not self._recent:
            return
        numbers = [int(name[6:12]) for name in self._paths if name.startswith(self.writer)]
        name = f"{self.writer}-{max(numbers, default=-1) + 1:06d}.safetensors"
        path = self.folder / "pending.tmp" / name
        outputs = list(self._recent.values())
        tensors = {part: torch.stack([output[part] for output in outputs]) for part in outputs[0]}
        sums = [_checksum(key, self._grid, output) for key, output in self._recent.items()]
        tensors["checksums"] = torch.tensor(sums)
        tensors["keys"] = torch.frombuffer(bytearray(json.dumps(list(self._recent)).encode()), dtype=torch.uint8)
        with writing(path, also=(SafetensorError,)):
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path, metadata={"grid": json.dumps(self._grid)})
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # a power cut must not leave the name without the contents
        self._paths[name] = path
        self._index.update({key: (name, row) for row, key in enumerate(self._recent)})
        self._recent = {}

    def refresh(self) -> None:
        """Finds what all processes have flushed."""
        new = []
        for path in self.folder.glob("[0-9]*/*.safetensors"):
            if path.name not in self._paths:
                new.append(path)
            self._paths[path.name] = path
        # Two processes may have encoded the same image between two flushes: each continues with its own output.
        for path in sorted(new, key=lambda path: (not path.name.startswith(self.writer), path)):
            try:
                keys, self._grid = _read_keys(path)
            except (OSError, ValueError) as error:
                logger.warning("%s is damaged (%s): delete it; its images are encoded again", path, error)
                continue
            for row, key in enumerate(keys):
                self._index.setdefault(key, (path.name, row))

    def _encode(self, keys: list[str], images: torch.Tensor, means: torch.Tensor, teacher: Teacher) -> None:
        if sum(part.nbytes for output in self._recent.values() for part in output.values()) >= self.shard_bytes:
            self.write()
        output = teacher(images)
        tensors = {"mean": means, "features": output.features.to(torch.bfloat16).cpu()}
        if output.summary is not None:
            tensors["summary"] = output.summary.to(torch.bfloat16).cpu()
        for row, key in enumerate(keys):
            self._recent[key] = {name: tensor[row] for name, tensor in tensors.items()}
        self._grid = output.grid

    def _read(self, keys: list[str]) -> list[dict[str, torch.Tensor]]:
        outputs = [self._recent.get(key, {}) for key in keys]
        in_shard: dict[str, list[int]] = defaultdict(list)
        for i, key in enumerate(keys):
            if not outputs[i]:
                in_shard[self._index[key][0]].append(i)
        for name, places in in_shard.items():
            path = self._paths[name]
            with safe_open(path, "pt") as shard:
                slices = {part: shard.get_slice(part) for part in shard.keys() if part != "keys"}
                for i in places:
                    outputs[i] = {part: rows[self._index[keys[i]][1]] for part, rows in slices.items()}
                    # older versions wrote no checksums
                    wanted = outputs[i].pop("checksums", None)
                    if wanted is not None and wanted != _checksum(keys[i], self._grid, outputs[i]):
                        raise ValueError(
                            f"{path} is damaged: the outputs of {keys[i]} have another checksum. Delete the file and "
                            "run the same command again; its images are encoded again"
                        )
        return outputs


class TeacherCaches(dict[str, TeacherCache]):
    """The caches of the teachers that this process serves, by name. Made and flushed by all processes together.

    Args:
        fingerprints: cache -> what `cache_fingerprint` returned, also for teachers that other processes serve.
        served: the caches of the teachers that this process serves.

    Raises:
        ValueError: the folder was filled under another fingerprint; the message says what differs.
        FileExistsError: another run writes into the folder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: str | Path,
        fingerprints: dict[str, dict[str, Any]],
        served: Iterable[str],
        shard_bytes: int = 256 << 20,
    ):
        self.accelerator, self.folder = accelerator, Path(folder)
        on_main_process(accelerator, lambda: self._open(fingerprints))
        rank = accelerator.process_index
        super().__init__({name: TeacherCache(self.folder / name, rank, shard_bytes) for name in served})

    def flush(self) -> None:
        """Keeps all outputs so far and shares them among the processes; to be called before every checkpoint.

        What all processes have added to a teacher's cache since the last flush becomes valid at once or, if they are
        killed before, not at all. A run that resumes from its checkpoint thus reads the same outputs as one that was
        not killed, or encodes the same batches again.
        """
        for cache in self.values():
            cache.write()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for pending in self.folder.glob("*/pending.tmp"):
                number = max([int(path.name) for path in pending.parent.glob("[0-9]*")], default=-1) + 1
                os.replace(pending, pending.with_name(f"{number:06d}"))
        self.accelerator.wait_for_everyone()
        for cache in self.values():
            cache.refresh()

    def close(self) -> None:
        """Releases the folder for other runs. What was not flushed is lost."""
        if self.accelerator.is_main_process:
            self._lock.close()

    def _open(self, fingerprints: dict[str, dict[str, Any]]) -> None:
        """Checks and takes the folder, on the main process."""
        for name, fingerprint in fingerprints.items():
            _check_fingerprint(self.folder / name / "fingerprint.json", fingerprint)
        self._lock = lock_folder(
            self.folder,
            f"another run writes teachers' outputs into {self.folder}; wait for it, stop it, or choose another folder",
        )
        try:
            for name, fingerprint in fingerprints.items():
                path = self.folder / name / "fingerprint.json"
                with writing(path):
                    write_json(path, fingerprint)
                remove(path.parent / "pending.tmp")  # a killed run's
        except OSError:
            self._lock.close()
            raise


def _checksum(key: str, grid: tuple[int, int], output: dict[str, torch.Tensor]) -> int:
    """A number below 2**63. It is a sum, as a CRC of features would take longer than reading them in every epoch."""
    total = zlib.crc32(f"{key} {grid}".encode())
    for part in sorted(output):
        data = output[part].reshape(-1).view(torch.uint8).numpy()
        total += int(data.view(np.uint64 if data.nbytes % 8 == 0 else np.uint16).sum(dtype=np.uint64))
    return total % 2**63


def _read_keys(path: Path) -> tuple[list[str], tuple[int, int]]:
    """The keys of a shard's images, and the grid of their features.

    Raises:
        OSError, ValueError: the file is damaged, as far as keys and shapes tell.
    """
    try:
        with safe_open(path, "pt") as shard:
            keys = json.loads(shard.get_tensor("keys").numpy().tobytes())
            height, width = json.loads(shard.metadata()["grid"])
            shapes = {part: shard.get_slice(part).get_shape() for part in shard.keys() if part != "keys"}
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(one_line(error)) from error
    whole = {"mean", "features"} <= shapes.keys() and all(shape[:1] == [len(keys)] for shape in shapes.values())
    if not whole or shapes["features"][1] != height * width:
        raise ValueError(f"{len(keys)} names, a grid of {height} x {width} and shapes {shapes} do not fit together")
    return keys, (height, width)


def _check_fingerprint(path: Path, fingerprint: dict[str, Any]) -> None:
    if not path.exists():
        return
    try:
        changed = differences(json.loads(path.read_text(encoding="utf-8")), fingerprint)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, so it is unknown what {path.parent} holds; delete this folder, or choose another"
        ) from error
    if changed:
        raise ValueError(
            f"{path.parent} holds outputs of another teacher or for other crops: it differs in {', '.join(changed)}; "
            "restore these, choose another folder, or delete this one"
        )


def cache_name(teacher: str, sides: Iterable[int]) -> str:
    """A teacher's cache for crops of these sides: JPEGs are decoded only as finely as the largest side needs."""
    return f"{teacher}-{max(sides)}"


def cache_fingerprint(
    teacher: TeacherRecipe, weights: str, image_size: int, data: DataConfig, files: dict[str, str], largest_side: int
) -> dict[str, Any]:
    """Everything that a teacher's output for an image depends on; not where the weights lie, as they may move.

    Args:
        weights: a hash of the weights and of the layers.
        image_size: the built teacher's, in pixels.
        files: data set -> the fingerprint of its source.
        largest_side: the largest side of a crop in the stream, in pixels (see `cache_name`).
    """
    return {
        **{"type": teacher.type, "weights": weights, "image_size": image_size, "dtype": teacher.dtype},
        **{f"options.{key}": value for key, value in teacher.options.items()},
        **{f"data.{key}": getattr(data, key) for key in ("crop_scale", "crop_ratio", "horizontal_flip")},
        **{f"files of {f'data.sources.{name}' if name else 'data.path'}": value for name, value in files.items()},
        "largest_side": largest_side,
    }


def estimate_bytes(images: int, shapes: Iterable[TeacherShape]) -> int:
    """Bytes on the disk that the outputs of some teachers take for this many images, in bf16."""
    numbers = 0  # per image
    for shape in shapes:
        numbers += (shape.image_size // shape.patch_size) ** 2 * shape.feature_dim + (shape.summary_dim or 0)
    return 2 * images * numbers


def check_room(folder: str | Path, bytes_needed: dict[str, int], checkpoints: int = 0) -> int:
    """How many bytes are still to be written into caches.

    Args:
        bytes_needed: cache -> bytes when it is complete, those that it holds included.
        checkpoints: bytes that the run will write besides, on the same disk.

    Raises:
        OSError: they do not fit on the disk.
    """
    folder = Path(folder).absolute()
    missing = 0
    for name, needed in bytes_needed.items():
        held = sum(path.stat().st_size for path in (folder / name).glob("[0-9]*/*.safetensors"))
        missing += max(needed - held, 0)
    free = shutil.disk_usage(existing(folder)).free
    if missing + checkpoints > free:
        each = ", ".join(f"{name} {needed / 1e9:,.1f} GB" for name, needed in bytes_needed.items())
        beside = f", and the checkpoints {checkpoints / 1e9:,.1f} GB on the same disk" if checkpoints else ""
        raise OSError(
            f"the outputs of the teachers ({each}) need another {missing / 1e9:,.1f} GB in {folder}{beside}, which "
            f"has {free / 1e9:,.1f} GB free; choose a folder on a larger disk, take fewer images, or train without it"
        )
    return missing
