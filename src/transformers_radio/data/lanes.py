"""What the worker processes do: they read their lanes in order, decode, and hand batches over."""

import copy
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .config import DataConfig
from .errors import SourceError
from .images import SkippedImage, load_crops
from .source import Source

# Number of images that messages and the state name, per lane.
MAX_OFFENDERS = 5
# With fewer shards per lane than this, shards are split so that the lanes' shares of an epoch do not differ by much.
MIN_SHARDS_PER_LANE = 8
# Batches that each worker makes ahead.
PREFETCH = 2
# First number of the key of every random draw, so that no two purposes share one.
SHARD_ORDER, WINDOW_ORDER, CROP, MIXTURE = 0, 1, 2, 3


def new_position() -> dict[str, Any]:
    """What a lane has consumed: this many records of its unit-th unit in this epoch. Later keys never restart."""
    return {"epoch": 0, "unit": 0, "consumed": 0, "seen": 0, "skipped": {}, "offenders": []}


def position_key(name: str, lane: int) -> str:
    """The key of a position: a lane of a data set, which has the name "" when it is the only one."""
    return f"{name}/{lane}" if name else str(lane)


def slot_bytes(batch_size: int, resolutions: list[int]) -> int:
    return batch_size * 3 * sum(r * r for r in resolutions)


def parts_of_a_shard(shards: int, lanes: int) -> int:
    """The number of parts that each shard is split into: one when there are plenty of shards."""
    fits = (n for n in itertools.count(1) if shards * n % lanes == 0 or shards * n >= MIN_SHARDS_PER_LANE * lanes)
    return next(fits)


def reasons_text(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


@dataclass(frozen=True)
class Plan:
    """What the batches of a stream hold; the same on all ranks.

    Attributes:
        sources: name -> data set. Each has lanes of its own; a batch is filled from the same lane of all of them.
        shares: name -> share of the images.
        resolutions: sides of the crops, in pixels.
        batch_size: images per batch of a rank.
        lanes: number of lanes over all ranks.
    """

    sources: dict[str, Source]
    shares: dict[str, float]
    config: DataConfig
    resolutions: list[int]
    batch_size: int
    seed: int
    lanes: int


class LaneBatches(IterableDataset):
    """The batches of one rank from its current position on; in a DataLoader worker, every num_workers-th of them.

    Args:
        positions: `position_key` -> `new_position` or a later one, for the lanes of this rank.
        first, step: the rank makes the batches first, first + step, ... of the run.
    """

    def __init__(self, plan: Plan, positions: dict[str, dict[str, Any]], first: int, step: int):
        self.plan = plan
        self.positions = positions
        self.first = first
        self.step = step
        # Where the workers hand over pixels: a few slots each, written in turn. New shared memory for every batch
        # would cost a page fault per 4 KiB, together a quarter of the decoding time. PREFETCH + 1 slots are enough:
        # the loader asks a worker for a batch when it has returned the one PREFETCH before, and the one before that
        # is copied.
        workers = plan.config.num_workers
        size = slot_bytes(plan.batch_size, plan.resolutions)
        self.slots = torch.empty(max(1, workers), PREFETCH + 1, size, dtype=torch.uint8)
        if workers:
            self.slots.share_memory_()
        self.splits = {name: parts_of_a_shard(len(one.shards), plan.lanes) for name, one in plan.sources.items()}

    def views(self, pixels: Tensor) -> dict[int, Tensor]:
        """Cuts a slot, uint8 (bytes,), into resolution r -> (B, r, r, 3)."""
        count, resolutions = self.plan.batch_size, self.plan.resolutions
        parts = pixels.split([count * 3 * r * r for r in resolutions])
        return {r: part.view(count, r, r, 3) for r, part in zip(resolutions, parts, strict=True)}

    def __iter__(self) -> Iterator[tuple[int, int, list[str], list[int], dict[str, dict[str, Any]]]]:
        """Yields (worker, slot, keys, epochs, positions that have moved); the pixels are in `slots[worker, slot]`."""
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes from its workers in turn.
        first, step = self.first + worker_id * self.step, self.step * workers
        samples: dict[str, Iterator[tuple[int, str, dict[int, Tensor]]]] = {}
        for number in itertools.count():
            lane = (first + number * step) % self.plan.lanes
            names = self.mixture(first + number * step)
            for name in names:
                if position_key(name, lane) not in samples:
                    samples[position_key(name, lane)] = self._samples(name, lane)
            epochs, keys, crops = zip(*(next(samples[position_key(name, lane)]) for name in names), strict=True)
            slot = number % (PREFETCH + 1)
            for r, view in self.views(self.slots[worker_id, slot]).items():
                # B x (3, r, r) -> (B, r, r, 3), which is how crops lie in memory: a plain copy
                torch.stack([crop[r].permute(1, 2, 0) for crop in crops], out=view)
            moved = sorted({position_key(name, lane) for name in names})
            yield worker_id, slot, list(keys), list(epochs), {key: copy.deepcopy(self.positions[key]) for key in moved}

    def mixture(self, batch: int) -> list[str]:
        """The data set of every image of a batch, drawn by the shares from (seed, batch, place in the batch) alone."""
        plan, names = self.plan, list(self.plan.sources)
        if len(names) == 1:
            return names * plan.batch_size
        draws = np.random.default_rng([plan.seed, MIXTURE, batch]).random(plan.batch_size)
        bounds = np.cumsum([plan.shares[name] for name in names])[:-1]
        return [names[i] for i in np.searchsorted(bounds, draws, side="right")]

    def _samples(self, name: str, lane: int) -> Iterator[tuple[int, str, dict[int, Tensor]]]:
        """Decodes the images of a lane from its position on, and keeps the position just behind the one yielded."""
        config, source = self.plan.config, self.plan.sources[name]
        position = self.positions[position_key(name, lane)]
        used_in_epoch = position["unit"] > 0 or position["consumed"] > 0  # resumed midway: assume that there was one
        for key, image, random_key in self._records(name, lane, position):
            if random_key is None:  # the end of an epoch
                if not used_in_epoch:
                    raise SourceError(
                        f"Lane {lane} of {self.plan.lanes} found no usable image in a whole pass over its part of"
                        f" {source.path} (skipped: {reasons_text(position['skipped']) or 'none'}"
                        f" {'; '.join(position['offenders'])}). If the source is small, lower data.num_workers or"
                        " data.lanes."
                    )
                used_in_epoch = False
                continue
            position["consumed"] += 1
            position["seen"] += 1
            # Each group of teachers has its own seed; frozen crops are the same for all of them.
            frozen = [0, CROP, 0, *random_key[1:]]
            generator = np.random.default_rng(frozen if config.frozen_crops else [self.plan.seed, CROP, *random_key])
            try:
                crops = load_crops(source.read(image), self.plan.resolutions, generator, config)
            except SkippedImage as error:
                reason = f"{name}/{error.reason}" if name else error.reason
                position["skipped"][reason] = position["skipped"].get(reason, 0) + 1
                if len(position["offenders"]) < MAX_OFFENDERS:
                    position["offenders"].append(f"{key} ({error.reason})")
                continue
            used_in_epoch = True
            yield position["epoch"], key, crops

    def _records(
        self, name: str, lane: int, position: dict[str, Any]
    ) -> Iterator[tuple[str, Any, tuple[int, ...] | None]]:
        """Yields (key, undecoded image, (epoch, shard, record)) endlessly, and ("", None, None) after each epoch.

        Skips, without decoding, what `position` says is consumed, and advances its epoch and unit.
        """
        plan, split, window_size = self.plan, self.splits[name], self.plan.config.shuffle_window
        source = plan.sources[name]
        # each set of a mixture draws in its own way, whatever the others are
        own = (zlib.crc32(name.encode()),) if name else ()
        while True:
            epoch = position["epoch"]
            generator = np.random.default_rng([plan.seed, SHARD_ORDER, epoch, *own])
            order = generator.permutation(len(source.shards) * split)
            units = order[lane :: plan.lanes].tolist()
            while position["unit"] < len(units):
                unit = units[position["unit"]]
                shard, offset = divmod(unit, split)
                window, inside = divmod(position["consumed"], window_size)
                indices = source.part(shard, offset, split)[window * window_size :]
                records = zip(indices, source.records(shard, indices), strict=False)
                while samples := list(itertools.islice(records, window_size)):
                    generator = np.random.default_rng([plan.seed, WINDOW_ORDER, epoch, unit, window, *own])
                    for i in generator.permutation(len(samples))[inside:]:
                        index, (key, image) = samples[i]
                        yield key, image, (epoch, shard, index, *own)
                    window, inside = window + 1, 0
                position["unit"] += 1
                position["consumed"] = 0
            yield "", None, None
            position["epoch"] += 1
            position["unit"] = 0


def init_worker(worker_id: int) -> None:
    from fsspec.asyn import reset_lock

    torch.set_num_threads(1)  # one core per worker: the workers are the parallelism
    # Ctrl-C, and the SIGTERM of a cluster that wants the job to end, reach the workers too. They have to stay alive so
    # that the main process can finish its step and save. Only the main process itself may terminate them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None  # this runs in workers only
        threading.Thread(target=_exit_when_terminated_by, args=[parent.pid], daemon=True).start()
    exit_with_parent()
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF and the like, once per image
    reset_lock()  # a lock of remote file systems does not survive the fork


def exit_with_parent(worker_id: int = 0) -> None:
    """For a loader's `worker_init_fn`: a worker ends when its main process has been killed.

    Torch's own watch compares the number of the parent process, which under "forkserver" (Python's default from 3.14)
    is that of a server that the workers themselves keep alive.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _exit_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def unchanged(item: Any) -> Any:
    """A collate function that changes nothing; the loader's own would turn numbers into tensors."""
    return item
