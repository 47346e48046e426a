"""What the worker processes do: read their lanes in order, decode, and hand batches over."""

import copy
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .images import SkippedImage, load_crops
from .source import DataConfig, Source, SourceError, read_image

# Images that are named in messages and in the state, per lane.
MAX_OFFENDERS = 5
# With fewer shards per lane than this, shards are split so that the lanes' shares of an epoch do not differ by much.
MIN_SHARDS_PER_LANE = 8
# Batches that each worker makes ahead.
PREFETCH = 2
# First number of the key of every random draw, so that no two purposes share one.
SHARD_ORDER, WINDOW_ORDER, CROP = 0, 1, 2


def new_position() -> dict[str, Any]:
    """What a lane has consumed: so many records of its unit-th unit in this epoch. The counters never restart."""
    return {"epoch": 0, "unit": 0, "consumed": 0, "seen": 0, "skipped": {}, "offenders": []}


def slot_bytes(batch_size: int, resolutions: list[int]) -> int:
    return batch_size * 3 * sum(r * r for r in resolutions)


def reasons_text(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


class LaneBatches(IterableDataset):
    """The batches of one rank from its current position on; in a DataLoader worker, every num_workers-th of them.

    Args:
        positions: lane -> `new_position` or a later one, for the lanes of this rank.
        lanes: their number over all ranks.
        first, step: the rank makes the batches first, first + step, ... of the run.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        resolutions: list[int],
        batch_size: int,
        seed: int,
        positions: dict[int, dict[str, Any]],
        lanes: int,
        first: int,
        step: int,
    ):
        self.source = source
        self.config = config
        self.resolutions = resolutions
        self.batch_size = batch_size
        self.seed = seed
        self.positions = positions
        self.lanes = lanes
        self.first = first
        self.step = step
        # Where the workers hand over pixels: a few slots each, written in turn. New shared memory for every batch
        # would cost a page fault per 4 KiB, together a quarter of the decoding time. PREFETCH + 1 slots are enough:
        # the loader asks a worker for a batch when it has returned the one PREFETCH before, and the one before that
        # is copied.
        size = slot_bytes(batch_size, resolutions)
        self.slots = torch.empty(max(1, config.num_workers), PREFETCH + 1, size, dtype=torch.uint8)
        if config.num_workers:
            self.slots.share_memory_()
        # Into how many interleaved parts each shard is split: one when there are plenty of shards.
        shards = len(source.shards)
        self.split = next(
            n for n in itertools.count(1) if shards * n % lanes == 0 or shards * n >= MIN_SHARDS_PER_LANE * lanes
        )

    def views(self, pixels: Tensor) -> dict[int, Tensor]:
        """Cut a slot, uint8 (bytes,), into resolution r -> (B, r, r, 3)."""
        parts = pixels.split([self.batch_size * 3 * r * r for r in self.resolutions])
        return {r: part.view(self.batch_size, r, r, 3) for r, part in zip(self.resolutions, parts, strict=True)}

    def __iter__(self) -> Iterator[tuple[int, int, list[str], list[int], int, dict[str, Any]]]:
        """Yield (worker, slot, keys, epochs, lane, position) with the pixels in `slots[worker, slot]`."""
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes from its workers in turn.
        first, step = self.first + worker_id * self.step, self.step * workers
        samples: dict[int, Iterator[tuple[int, str, dict[int, Tensor]]]] = {}
        for number in itertools.count():
            lane = (first + number * step) % self.lanes
            if lane not in samples:
                samples[lane] = self._samples(lane, self.positions[lane])
            epochs, keys, crops = zip(*itertools.islice(samples[lane], self.batch_size), strict=True)
            slot = number % (PREFETCH + 1)
            for r, view in self.views(self.slots[worker_id, slot]).items():
                # B x (3, r, r) -> (B, r, r, 3), which is how crops lie in memory: a plain copy
                torch.stack([crop[r].permute(1, 2, 0) for crop in crops], out=view)
            yield worker_id, slot, list(keys), list(epochs), lane, copy.deepcopy(self.positions[lane])

    def _samples(self, lane: int, position: dict[str, Any]) -> Iterator[tuple[int, str, dict[int, Tensor]]]:
        """Decode the images of a lane from `position` on, and keep `position` just behind the one yielded."""
        config = self.config
        used_in_epoch = position["unit"] > 0 or position["consumed"] > 0  # resumed midway: give it the benefit
        for key, image, random_key in self._records(lane, position):
            if random_key is None:  # the end of an epoch
                if not used_in_epoch:
                    raise SourceError(
                        f"Lane {lane} of {self.lanes} found no usable image in a whole pass over its part of"
                        f" {config.path} (skipped: {reasons_text(position['skipped']) or 'none'}"
                        f" {'; '.join(position['offenders'])}). If the source is small, lower data.num_workers or"
                        " data.lanes."
                    )
                used_in_epoch = False
                continue
            position["consumed"] += 1
            position["seen"] += 1
            generator = np.random.default_rng([self.seed, CROP, *random_key])
            try:
                crops = load_crops(
                    read_image(image),
                    self.resolutions,
                    generator,
                    config.crop_scale,
                    config.crop_ratio,
                    config.horizontal_flip,
                    config.min_side,
                )
            except SkippedImage as error:
                position["skipped"][error.reason] = position["skipped"].get(error.reason, 0) + 1
                if len(position["offenders"]) < MAX_OFFENDERS:
                    position["offenders"].append(f"{key} ({error.reason})")
                continue
            used_in_epoch = True
            yield position["epoch"], key, crops

    def _records(self, lane: int, position: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[int, int, int] | None]]:
        """Yield (key, undecoded image, (epoch, shard, record)) for ever, and ("", None, None) after each epoch.

        Skips what `position` says is consumed without decoding it, and moves its epoch and unit on.
        """
        window_size = self.config.shuffle_window
        while True:
            epoch = position["epoch"]
            generator = np.random.default_rng([self.seed, SHARD_ORDER, epoch])
            order = generator.permutation(len(self.source.shards) * self.split)
            units = order[lane :: self.lanes].tolist()
            while position["unit"] < len(units):
                unit = units[position["unit"]]
                shard, offset = divmod(unit, self.split)
                window, inside = divmod(position["consumed"], window_size)
                first = offset + window * window_size * self.split
                records = itertools.islice(enumerate(self.source.records(shard)), first, None, self.split)
                while samples := list(itertools.islice(records, window_size)):
                    generator = np.random.default_rng([self.seed, WINDOW_ORDER, epoch, unit, window])
                    for i in generator.permutation(len(samples))[inside:]:
                        index, (key, image) = samples[i]
                        yield key, image, (epoch, shard, index)
                    window, inside = window + 1, 0
                position["unit"] += 1
                position["consumed"] = 0
            yield "", None, None
            position["epoch"] += 1
            position["unit"] = 0


def init_worker(worker_id: int) -> None:
    import fsspec

    torch.set_num_threads(1)  # one core per worker: the workers are the parallelism
    # Ctrl-C, and the SIGTERM of a cluster that wants the job to end, reach the workers too. They have to live on, for
    # the main process to finish its step and save. Only the main process itself may terminate them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_when_terminated_by, args=[os.getppid()], daemon=True).start()
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF and the like, once per image
    fsspec.asyn.reset_lock()  # a lock of remote file systems does not survive the fork


def _exit_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def unchanged(item: Any) -> Any:
    """The loader's own collate function would make tensors of numbers."""
    return item
