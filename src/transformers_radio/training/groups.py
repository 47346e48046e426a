"""Which process serves which group of teachers, and what it runs in a step (paper section 4, partitioning).

Teachers that see the same images at one student resolution are a group. A process serves one group when there are
enough processes, and several in turn when there are not; it builds only the teachers it serves. The images of a step,
and the weight of each, follow from the recipe alone, so that the update does not depend on the number of processes.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from transformers_radio.teachers import Teacher

from .recipe import GroupRecipe, StageRecipe
from .student import TeacherShape

ONLY_GROUP = "all"  # the name of the group of a stage without `groups`


@dataclass(frozen=True)
class Group:
    """One group of a stage as one process sees it.

    Attributes:
        name: its key in `stages.<stage>.groups`, or ONLY_GROUP in a stage without groups.
        where: its place in the recipe, for messages: `stages.<stage>.groups.<name>`, or `stages.<stage>`.
        teachers: their names; they see the same crops.
        resolution: the student's input side in pixels.
        batch_size: images per step in which the group takes part, over all its processes.
        micro_batch_size: images per forward pass of one process.
        passes: forward passes per process in such a step.
        rate: share of the steps in which it takes part, in (0, 1].
        max_aspect_ratio: of the student's input; 1 for squares.
        image_weight: weight of one image in a step's loss; those of all images of all groups sum to 1.
        ranks: the processes that serve it.
        index: this process's place among them; None when it does not serve the group.
    """

    name: str
    where: str
    teachers: tuple[str, ...]
    resolution: int
    batch_size: int
    micro_batch_size: int
    passes: int
    rate: float
    max_aspect_ratio: float
    image_weight: float
    ranks: tuple[int, ...]
    index: int | None

    def sides(self, teachers: Mapping[str, Teacher] | Mapping[str, TeacherShape]) -> list[int]:
        """The sides in pixels at which the group needs each crop: the student's and its teachers'."""
        return sorted({self.resolution, *(teachers[name].image_size for name in self.teachers)})

    @property
    def seed_offset(self) -> int:
        """Added to the recipe's seed, so that each group goes through the data in an order of its own."""
        return 0 if self.name == ONLY_GROUP else zlib.crc32(self.name.encode())

    def generator(self, seed: int, step: int) -> torch.Generator:
        """Random numbers of a step that are the same on all processes of the group.

        Args:
            seed: the recipe's.
            step: counted over all stages.
        """
        return torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name} {step}".encode()))

    def input_sizes(self, step: int) -> list[tuple[int, int]]:
        """All (height, width) in pixels that the student's input may have; the square is the first.

        Args:
            step: what the sides are multiples of, the student's `min_resolution_step`.
        """
        side = self.resolution
        shortest = step * math.ceil(side / self.max_aspect_ratio / step - 1e-9)
        shorter = range(max(shortest, step), side, step)
        return [(side, side), *((short, side) for short in shorter), *((side, short) for short in shorter)]

    def takes_part(self, step: int) -> bool:
        """Whether the group's turn is in this step of the stage, from 0: evenly spread, the first step included."""
        return self.turns_before(step + 1) > self.turns_before(step)

    def turns_before(self, step: int) -> int:
        """In how many of the stage's steps before this one the group takes part."""
        # A little less than 1, so that rounding of rates such as 1/3 moves no turn.
        return int(1 - 1e-9 + step * self.rate)


def stage_groups(
    name: str, stage: StageRecipe, teachers: list[str], rank: int = 0, world_size: int = 1
) -> list[Group]:
    """The groups of a stage, in the recipe's order, with the processes that serve them.

    Args:
        name: the stage's, for messages.
        teachers: names of all teachers of the recipe; a stage or group that lists none has them all.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: a group's batch does not split into equal passes of its processes; the message says what does.
    """
    recipes = stage.groups or {
        ONLY_GROUP: GroupRecipe(stage.teachers, stage.resolution, stage.batch_size, stage.micro_batch_size)
    }
    shares = {key: group.share for key, group in recipes.items()}
    served = assign_ranks(shares, world_size)
    total_images = sum(group.batch_size for group in recipes.values())
    total_share = sum(shares.values())
    groups = []
    for key, group in recipes.items():
        ranks = served[key]
        where = f"stages.{name}.groups.{key}" if stage.groups else f"stages.{name}"
        micro_batch_size, passes = micro_batch(where, group.batch_size, group.micro_batch_size, len(ranks))
        by_image = 1 / total_images
        by_rank = group.share / total_share / group.batch_size
        groups.append(
            Group(
                name=key,
                where=where,
                teachers=tuple(group.teachers or teachers),
                resolution=group.resolution,
                batch_size=group.batch_size,
                micro_batch_size=micro_batch_size,
                passes=passes,
                rate=group.rate,
                max_aspect_ratio=group.max_aspect_ratio,
                image_weight=by_image if stage.weighting == "per_image" else by_rank,
                ranks=ranks,
                index=ranks.index(rank) if rank in ranks else None,
            )
        )
    return groups


def assign_ranks(shares: dict[str, float], world_size: int) -> dict[str, tuple[int, ...]]:
    """Distributes the processes among the groups by their shares.

    With at least as many processes as groups each group has its own, neighbours in number: every group one, the others
    by largest remainder. With fewer, each group is served by one process, the largest share first to the process with
    the least to do.

    Returns:
        Group -> the numbers of its processes, ascending.
    """
    if world_size < len(shares):
        load = [0.0] * world_size
        served: dict[str, tuple[int, ...]] = {}
        for name in sorted(shares, key=lambda name: -shares[name]):
            rank = load.index(min(load))
            load[rank] += shares[name]
            served[name] = (rank,)
        return {name: served[name] for name in shares}
    spare = world_size - len(shares)
    # Each group has one process for certain; these are the further ones that its share gives it.
    wanted = {name: max(share / sum(shares.values()) * world_size - 1, 0.0) for name, share in shares.items()}
    scale = spare / sum(wanted.values()) if sum(wanted.values()) > 0 else 0.0
    exact = {name: value * scale for name, value in wanted.items()}
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: spare - sum(counts.values())]:
        counts[name] += 1
    served, first = {}, 0
    for name in shares:
        served[name] = tuple(range(first, first + counts[name] + 1))
        first += counts[name] + 1
    return served


def micro_batch(where: str, batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """Images per forward pass of a process, and forward passes per process and step."""
    size = micro_batch_size or batch_size // processes
    if size <= 0 or batch_size % (size * processes):
        raise ValueError(
            f"{where}.batch_size {batch_size} does not split into {processes} processes x micro_batch_size {size}; "
            f"make it a multiple of {max(size, 1) * processes}, or set micro_batch_size"
        )
    return size, batch_size // (size * processes)


def passes_in_step(groups: list[Group], rank: int, step: int) -> int:
    """Forward passes that a process has to run in this step of the stage."""
    return sum(group.passes for group in groups if rank in group.ranks and group.takes_part(step))
