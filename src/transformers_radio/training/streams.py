"""The images of a group on this process: read from the data, resumed from a checkpoint, moved to the device."""

import logging
from typing import Any

import torch

from transformers_radio.data import Batch, ImageStream

from .groups import Group
from .recipe import Recipe

logger = logging.getLogger(__name__)


def open_stream(
    recipe: Recipe, group: Group, sides: list[int], batch_size: int | None = None, seed: int | None = None
) -> ImageStream:
    """The images that this process reads for a group.

    Args:
        sides: of each crop, in pixels.
        batch_size: images per batch; None for the group's micro batches.
        seed: of the order of the images; None for the group's own order.
    """
    return ImageStream(
        recipe.data,
        resolutions=sides,
        batch_size=batch_size or group.micro_batch_size,
        seed=recipe.seed + group.seed_offset if seed is None else seed,
        rank=group.index or 0,
        world_size=len(group.ranks),
    )


def resume_stream(
    stream: ImageStream, position: dict[str, Any], recipe: Recipe, group: Group, same_stage: bool
) -> None:
    """Moves a stream to a position in the data that was saved for the group of this name.

    Args:
        same_stage: whether it was saved in this stage. The batches then must hold as many images as before, or they
            would be other batches; a later stage resumes with the images that were not seen yet.

    Raises:
        ValueError: the position does not fit, and `restart_data` is false.
    """
    try:
        before = position["batch_size"]
        if same_stage and before != group.micro_batch_size:
            raise ValueError(
                f"{group.where} had {before} images in a pass of a process when its position in the data was saved, "
                f"and has {group.micro_batch_size} now, which would change the order of the images: set "
                f"{group.where}.micro_batch_size={before}, on a number of processes that divides "
                f"{group.batch_size // before}."
            )
        stream.load_state_dict(position)
    except ValueError as error:
        if not recipe.restart_data:
            raise ValueError(f"{error} Or set restart_data=true: the pass over the data then begins again") from error
        logger.warning("the pass over the data begins again, as restart_data is true: %s", error)


def to_device(batch: Batch, device: torch.device) -> dict[int, torch.Tensor]:
    """Moves a batch as uint8, and makes float32 in [0, 1] of it on the device: side -> (B, 3, side, side)."""
    return {
        side: pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for side, pixels in batch.images.items()
    }
