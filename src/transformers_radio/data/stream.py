"""An endless stream of training batches whose order can be recomputed, so that a stopped run resumes exactly.

The source is dealt out to `lanes`, and batch j of the run (counted over all ranks) comes from lane j mod lanes. Each
lane reads its own part of every epoch in an order that is a function of (seed, epoch, position) alone. Ranks and
workers only share the lanes: neither their number nor their timing changes which images a batch holds. A few numbers
say what a lane has consumed; they travel with each batch, and saving the latest ones saves the stream.

In a mixture each data set has its own lanes, epochs and positions. Which set each image of batch j comes from is drawn
from (seed, j); the batch is filled from lane j mod lanes of those sets.
"""

import atexit
import copy
import dataclasses
import functools
import itertools
import logging
import math
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .columns import hint_of_base64, is_base64
from .config import DataConfig
from .errors import SourceError
from .images import SkippedImage, load_crops
from .lanes import (
    MAX_OFFENDERS,
    PREFETCH,
    LaneBatches,
    Plan,
    init_worker,
    new_position,
    parts_of_a_shard,
    position_key,
    reasons_text,
    slot_bytes,
    unchanged,
)
from .source import Source

logger = logging.getLogger(__name__)

# A share of skipped images says little about the first few; before this many, it is checked only after an epoch.
MIN_SEEN_FOR_SHARE = 200
# Far more than any run has workers.
MAX_LANES = 100_000


@dataclass
class Batch:
    """One micro-batch of a rank.

    Attributes:
        images: resolution r -> uint8 (B, 3, r, r), RGB, channels last in memory; the same crops at every resolution.
        keys: name of each image: the file relative to the folder, `file.tar/key` or `file.parquet/row`. In a mixture
            the name of the data set stands before it: `name/file.tar/key`.
        epochs: the pass over its source that each image belongs to, from 0.
        seen: images that this rank has looked at since the start, skipped ones included.
        skipped: reason, in a mixture `name/reason` -> images that this rank could not use since the start.
    """

    images: dict[int, Tensor]
    keys: list[str]
    epochs: list[int]
    seen: int
    skipped: dict[str, int]


class ImageStream:
    """Endless iterator of `Batch`, resumable to the bit.

    Every image of the source is used exactly once per epoch over all lanes. A batch is filled from one lane and may
    reach into its next epoch; nothing is dropped or padded.

    The random crop of an image is drawn once and resized from the image's own pixels to each of `resolutions`, so that
    the student and all teachers see the same picture. Images that cannot be used are skipped and counted per reason.

    Args:
        config: what to read.
        resolutions: sides r of the square outputs, in pixels.
        batch_size: images per batch (per rank).
        seed: decides order and crops.
        rank, world_size: this process and how many share the stream. All ranks have to take equally many batches.

    Raises:
        FileNotFoundError, ValueError: the source cannot be opened, or an argument is out of range.
        SourceError: while iterating, when more than `config.max_skipped_share` of the images of a data set were
            skipped (looked at from its 200th image on, and at the end of every epoch), or a shard cannot be read, of
            a server not even after `config.retry_seconds`.
    """

    def __init__(
        self,
        config: DataConfig,
        resolutions: list[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        config.validate()
        if not resolutions or min(resolutions) < 1:
            raise ValueError(f"resolutions={resolutions!r}: expected at least one side in pixels.")
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size={batch_size}, seed={seed}: expected 1 or more and 0 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size.")
        self.config = config
        self.resolutions = sorted(set(resolutions))
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        named = config.named_sources()
        self.sources = {name: Source(source, name, config.retry_seconds) for name, source in named.items()}
        total = sum(source.weight for source in named.values())
        self.shares = {name: source.weight / total for name, source in named.items()}
        # Weak, as the generator refers to the stream: workers have to end as soon as nobody holds it.
        self._batches: weakref.ref[Generator[Batch]] | None = None
        self._start(config.lanes or max(1, config.num_workers) * world_size, next_batch=0, saved_lanes=None)
        if rank == 0:
            for source in self.sources.values():
                traffic = source.traffic_note(parts_of_a_shard(len(source.shards), self.lanes), self.lanes)
                for note in source.notes + ([traffic] if traffic else []):
                    _warn_once(f"{source.where}.path={source.path!r}: {note}")

    def __iter__(self) -> Iterator[Batch]:
        """Starts the workers at the current position. Only batches that were taken count as consumed."""
        self.close()
        batches = self._iterate()
        self._batches = weakref.ref(batches)
        atexit.register(_close, self._batches)  # while the libraries that it reads with are still whole
        return batches

    def close(self) -> None:
        """Stops the workers. The position stays, and `iter(stream)` continues from it."""
        if self._batches is not None:
            _close(self._batches)

    def _plan(self) -> Plan:
        return Plan(self.sources, self.shares, self.config, self.resolutions, self.batch_size, self.seed, self.lanes)

    def _iterate(self) -> Generator[Batch]:
        self._check_shared_memory()
        first, step = self._next_batch + self.rank, self.world_size
        lane_batches = LaneBatches(self._plan(), copy.deepcopy(self._lanes), first, step)
        loader = DataLoader(
            lane_batches,
            batch_size=None,
            num_workers=self.config.num_workers,
            collate_fn=unchanged,
            worker_init_fn=init_worker,
            prefetch_factor=PREFETCH if self.config.num_workers else None,
            generator=torch.Generator(),  # without its own, the loader would draw from the global random state
        )
        try:
            for worker, slot, keys, epochs, positions in loader:
                shared = lane_batches.slots[worker, slot]  # copied, as the worker will write to it again
                if torch.cuda.is_available():
                    pixels = shared.pin_memory()
                else:  # with numpy: torch would wake threads for it, which then spin on the cores of the workers
                    pixels = torch.from_numpy(shared.numpy().copy())
                # (B, r, r, 3) -> (B, 3, r, r)
                images = {r: view.permute(0, 3, 1, 2) for r, view in lane_batches.views(pixels).items()}
                self._count(positions)
                self._next_batch += self.world_size
                yield Batch(images, keys, epochs, self.seen, self.skipped)
        except Exception as error:
            if self.config.num_workers == 0:
                raise
            # The loader's frames would keep its workers alive as long as the error exists. Nothing is lost without
            # them: the message holds the traceback of the worker.
            if isinstance(error, SourceError):  # its own message is the last line
                error.args = (str(error).rstrip().rpartition("\n")[2].rpartition("errors.SourceError: ")[2],)
            raise error.with_traceback(None) from None

    @property
    def seen(self) -> int:
        """Images this rank has looked at since the start, skipped ones included."""
        return sum(position["seen"] for position in self._lanes.values())

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of images this rank has skipped since the start."""
        return _sum_skipped(list(self._lanes.values()))

    def check(self) -> None:
        """Reads a little of the source before long work starts.

        Raises:
            ValueError: none of the first images can be decoded, there are too few for one batch of all ranks, or the
                shared memory is too small for the batches of the workers.
        """
        self._check_shared_memory(before_start=True)
        for name, source in self.sources.items():
            self._check_source(source, self.shares[name])

    def _check_source(self, source: Source, share: float) -> None:
        names, first, generator = [], Counter[str](), np.random.default_rng(0)
        whole = dataclasses.replace(self.config, crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=False)
        needed = max(math.ceil(share * self.batch_size * self.world_size), self.lanes)
        records = itertools.chain.from_iterable(map(source.records, range(len(source.shards))))
        count, decoded, hint = 0, False, ""
        for count, (key, image) in enumerate(records, start=1):
            if not decoded and count <= MIN_SEEN_FOR_SHARE:
                data = source.read(image)
                try:
                    load_crops(data, [8], generator, whole)
                    decoded = True
                except SkippedImage as error:
                    first[error.reason] += 1
                    names.append(key)
                    hint = hint_of_base64(source.image_columns[0]) if is_base64(data) else hint
            if count >= needed and (decoded or count >= MIN_SEEN_FOR_SHARE):
                break
        if not decoded:
            hint = hint or (
                f"Does the column {'/'.join(source.image_columns)!r} hold images, and is"
                f" data.min_side={self.config.min_side} right?"
            )
            if set(first) == {"missing"} and source.kind == "parquet":
                hint += f" Paths must lead below {source.image_root!r}, or else set {source.where}.image_root."
            raise ValueError(
                f"{source.where}.path={source.path!r}: none of the first {len(names)} images can be used"
                f" ({reasons_text(first)}): {', '.join(names[:MAX_OFFENDERS])}. {hint}"
            )
        if count < needed:
            of_share = "" if share == 1 else f", of which it gives a share of {share:.3g},"
            raise ValueError(
                f"{source.where}.path={source.path!r} holds {count} images; a batch of {self.batch_size} on each of"
                f" {self.world_size} ranks{of_share} over {self.lanes} lanes needs {needed}. Lower the batch size,"
                " data.num_workers or data.lanes."
            )

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch taken, as plain JSON types.

        It holds only the lanes of this rank; `merge_states` joins those of all ranks.
        """
        return {
            "order": self._order(),
            "lane_count": self.lanes,
            "batch_size": self.batch_size,
            "next_batch": self._next_batch,
            "lanes": copy.deepcopy(self._lanes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved.

        Workers, ranks, resolutions and batch size may have changed; with another batch size (that of the state is
        `state["batch_size"]`) the images to come are grouped differently.

        Raises:
            ValueError: the source, the seed or a setting that decides the order is not the same, or the state lacks
                lanes that this rank has to read.
        """
        now = self._order()
        for field in set(now) - set(state["order"]):
            if field.endswith("row_ranges") or field == "max_pixels":  # saved by an earlier version
                del now[field]
        changed = [
            f"{field}: {state['order'].get(field)!r} when saved, {now.get(field)!r} now"
            for field in {**now, **state["order"]}
            if state["order"].get(field) != now.get(field)
        ]
        if changed:
            raise ValueError(
                f"The saved position in {self._paths()} does not fit, as the order of the images has changed"
                f" ({'; '.join(changed)}). Restore these, or start a new run."
            )
        lanes = self.config.lanes or state["lane_count"]
        if lanes != state["lane_count"]:
            raise ValueError(
                f"The position was saved with data.lanes={state['lane_count']} and cannot continue with {lanes}:"
                f" set data.lanes={state['lane_count']}."
            )
        self.close()
        for name, source in self.sources.items():
            source.row_ranges = f"{name}.row_ranges".lstrip(".") in state["order"]
        self._start(lanes, state["next_batch"], state["lanes"])

    def _start(self, lanes: int, next_batch: int, saved_lanes: dict[str, Any] | None) -> None:
        if lanes > MAX_LANES:
            raise ValueError(
                f"data.lanes={lanes}: expected at most {MAX_LANES}; a checkpoint holds a position of each."
            )
        readers = self.world_size * max(1, self.config.num_workers)
        if lanes % readers:
            raise ValueError(
                f"data.lanes={lanes} cannot be shared out to {self.world_size} ranks with {self.config.num_workers}"
                f" workers each: it must be a multiple of {readers}. For a new run set"
                f" data.lanes={-(-lanes // readers) * readers}; to resume one, set data.num_workers so that its"
                f" product with the ranks divides {lanes}."
            )
        # This rank takes batches next_batch + rank, next_batch + rank + world_size, ...
        own = sorted({(next_batch + self.rank + i * self.world_size) % lanes for i in range(lanes // self.world_size)})
        keys = [position_key(name, lane) for name in self.sources for lane in own]
        if saved_lanes is None:
            saved_lanes = {key: new_position() for key in keys}
        if any(key not in saved_lanes for key in keys):
            raise ValueError(
                f"The state holds lanes {', '.join(saved_lanes)} but this rank reads {', '.join(keys)}: it was saved"
                " by one of several ranks. Join the states of all ranks with transformers_radio.data.merge_states"
                " first."
            )
        self.lanes = lanes
        self._next_batch = next_batch
        self._lanes = {key: copy.deepcopy(saved_lanes[key]) for key in keys}
        self._lanes_of = {name: [position_key(name, lane) for lane in own] for name in self.sources}

    def _check_shared_memory(self, before_start: bool = False) -> None:
        if not os.path.isdir("/dev/shm"):
            return
        needed = self.config.num_workers * (PREFETCH + 1) * slot_bytes(self.batch_size, self.resolutions)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # those of this machine share its memory
        usage = shutil.disk_usage("/dev/shm")
        # once the others have started, the memory that they hold is not free, and must not be counted twice
        if ranks * needed <= (usage.free if before_start else usage.total) and needed <= usage.free:
            return
        of_all = f" on each of {ranks} ranks of this machine" if ranks > 1 else ""
        raise ValueError(
            f"{self.config.num_workers} workers need {needed / 2**20:.0f} MiB of shared memory for batches of"
            f" {self.batch_size} images at {self.resolutions}{of_all}, but /dev/shm has {usage.free / 2**20:.0f} MiB"
            f" left of {usage.total / 2**20:.0f}. Lower data.num_workers or the batch size, or enlarge it (in Docker:"
            " --shm-size)."
        )

    def _paths(self) -> str:
        return ", ".join(repr(source.path) for source in self.sources.values())

    def _order(self) -> dict[str, Any]:
        """Everything that decides which image comes next in a lane."""
        config = self.config
        order: dict[str, Any] = {"seed": self.seed}
        for name, source in self.sources.items():
            prefix = f"{name}." if name else ""
            order |= {f"{prefix}shards": len(source.shards), f"{prefix}files": source.fingerprint}
            if source.row_ranges:
                order[f"{prefix}row_ranges"] = True
            if name:
                order[f"{prefix}weight"] = config.sources[name].weight
        return {
            **order,
            "shuffle_window": config.shuffle_window,
            "crop_scale": list(config.crop_scale),
            "crop_ratio": list(config.crop_ratio),
            "horizontal_flip": config.horizontal_flip,
            "frozen_crops": config.frozen_crops,
            "min_side": config.min_side,
            "max_pixels": config.max_pixels,
        }

    def _count(self, positions: dict[str, dict[str, Any]]) -> None:
        """Advances to `positions`, and checks each data set's share of skipped images."""
        epochs = {name: self._epoch(name) for name in self.sources}
        for key, position in positions.items():
            for offender in position["offenders"][len(self._lanes[key]["offenders"]) :]:
                logger.warning("Skipped image %s", offender)
            self._lanes[key] = position
        for name in self.sources:
            self._check_skipped(name, epoch_ended=self._epoch(name) > epochs[name])

    def _epoch(self, name: str) -> int:
        """The first pass over a data set that not all lanes of this rank have finished."""
        return min(self._lanes[key]["epoch"] for key in self._lanes_of[name])

    def _check_skipped(self, name: str, epoch_ended: bool) -> None:
        lanes = [self._lanes[key] for key in self._lanes_of[name]]
        seen, reasons = sum(lane["seen"] for lane in lanes), _sum_skipped(lanes)
        counted = seen
        if seen < MIN_SEEN_FOR_SHARE:
            if not epoch_ended:
                return
            counted *= self.world_size  # too few to judge the other ranks, whose images may all be fine
        if sum(reasons.values()) > self.config.max_skipped_share * counted:
            offenders = [offender for lane in lanes for offender in lane["offenders"]]
            raise SourceError(
                f"{sum(reasons.values())} of {seen} images of {self.sources[name].path} could not be used"
                f" ({reasons_text(reasons)}), more than"
                f" data.max_skipped_share={self.config.max_skipped_share} allows. The first:"
                f" {'; '.join(offenders[:10])}. Repair the source, or raise data.max_skipped_share."
            )


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the `state_dict`s of all ranks into one from which any number of ranks can resume.

    Raises:
        ValueError: the states are not of the same run and step.
    """
    for state in states:
        for field in ("order", "lane_count", "batch_size", "next_batch"):
            if state[field] != states[0][field]:
                raise ValueError(
                    f"The states of the ranks differ in {field!r} ({states[0][field]} and {state[field]}): they were"
                    " not saved at the same step of one run."
                )
    lanes = {lane: position for state in states for lane, position in state["lanes"].items()}
    return {**states[0], "lanes": lanes}


def _sum_skipped(lanes: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sum((Counter(lane["skipped"]) for lane in lanes), Counter()))


@functools.cache
def _warn_once(message: str) -> None:
    """Once per message, as every stage of a run opens its data anew."""
    logger.warning(message)


def _close(batches: "weakref.ref[Generator[Batch]]") -> None:
    generator = batches()
    if generator is not None:
        generator.close()
