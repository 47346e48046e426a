"""The teachers of this process: on its device, on the CPU until they are needed, or sharded over several processes."""

import math
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from transformers_radio.data import ImageStream, count_images
from transformers_radio.disk import existing
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher, build_teacher, digest_weights
from transformers_radio.training.run.processes import LONGEST_WAIT, on_main_process

from .cache import TeacherCaches, cache_fingerprint, cache_name, check_room, estimate_bytes
from .checks import checkpoint_bytes
from .groups import Group
from .recipe import Recipe, TeacherRecipe
from .student import TeacherShape


def build_teachers(
    recipe: Recipe, groups: dict[str, list[Group]], device: torch.device | str = "cpu"
) -> dict[str, Teacher]:
    """Loads the teachers that this process serves in any stage, frozen. Called by every process.

    Raises:
        ValueError: a teacher cannot be loaded, or one that is to be sharded is served by different processes in
            different groups.
    """
    ranks = sharding_ranks(recipe, groups)
    own = {name for stage in groups.values() for group in stage if group.index is not None for name in group.teachers}
    teachers = {}
    for name, spec in recipe.teachers.items():
        mesh = None
        if len(ranks.get(name, ())) > 1:
            # Every process has to call new_group, also those that are not in the group.
            group: Any = torch.distributed.new_group(list(ranks[name]), timeout=LONGEST_WAIT)
            mesh = DeviceMesh.from_group(group, torch.device(device).type) if name in own else None
        if name in own:
            teacher = load_teacher(name, spec)
            teachers[name] = _place(teacher, spec, torch.device(device), mesh)
    return teachers


def sharding_ranks(recipe: Recipe, groups: dict[str, list[Group]]) -> dict[str, tuple[int, ...]]:
    """The processes over which each sharded teacher is spread: those that serve it.

    Raises:
        ValueError: it is served by different processes in different groups.
    """
    ranks = {}
    for name in (name for name, spec in recipe.teachers.items() if spec.placement == "sharded"):
        served = {group.ranks for stage in groups.values() for group in stage if name in group.teachers}
        if len(served) > 1:
            raise ValueError(
                f"teachers.{name}.placement is sharded, but its groups are served by different processes "
                f"({', '.join(map(str, sorted(served)))}); put it into one group, or choose device or offloaded"
            )
        ranks[name] = next(iter(served), ())
    return ranks


def load_teacher(name: str, spec: TeacherRecipe) -> Teacher:
    """One teacher of a recipe, on the CPU.

    Raises:
        ValueError: it could not be loaded; the message names the teacher.
    """
    try:
        return build_teacher(spec.type, spec.checkpoint, image_size=spec.image_size, dtype=spec.dtype, **spec.options)
    except Exception as error:
        raise ValueError(f"teachers.{name} ({spec.type}, {spec.checkpoint}) could not be loaded: {error}") from error


def gather_shapes(accelerator: Accelerator, recipe: Recipe, teachers: dict[str, Teacher]) -> dict[str, TeacherShape]:
    """The shapes of all teachers of the recipe, and hashes of their weights, on every process."""
    own = [
        (name, replace(TeacherShape.of(teacher), weights=digest_weights(teacher)))
        for name, teacher in teachers.items()
    ]
    known = dict(gather_object(own))
    return {name: known[name] for name in recipe.teachers if name in known}


def open_caches(
    accelerator: Accelerator,
    recipe: Recipe,
    student: RadioModel,
    teachers: dict[str, Teacher],
    groups: dict[str, list[Group]],
    shapes: dict[str, TeacherShape],
) -> TeacherCaches | None:
    """The caches of the teachers' outputs; None when the recipe has none. Called by every process.

    Args:
        teachers: those that this process serves.
        groups, shapes: those of all processes.

    Raises:
        OSError: the outputs do not fit on the disk, or another run writes into the folder.
        ValueError: the folder holds outputs of other teachers or for other crops.
    """
    if recipe.teacher_cache is None:
        return None
    folder = recipe.teacher_cache
    teacher_of: dict[str, str] = {}  # cache -> teacher
    largest_side: dict[str, int] = {}  # cache -> pixels
    seen = Counter[str]()  # cache -> images that the run reads, epochs counted again
    served = set()
    for stage, stage_groups in groups.items():
        for group in stage_groups:
            for name in group.teachers:
                cache = cache_name(name, group.sides(shapes))
                teacher_of[cache], largest_side[cache] = name, max(group.sides(shapes))
                seen[cache] += math.ceil(recipe.stages[stage].steps * group.rate) * group.batch_size
                served |= {cache} if group.index is not None else set()

    layers = dict(gather_object([(name, _layers(teacher)) for name, teacher in teachers.items()]))

    def check_and_describe() -> dict[str, dict]:
        images = count_images(recipe.data)
        needed = {
            cache: estimate_bytes(min(images, seen[cache]), [shapes[name]]) for cache, name in teacher_of.items()
        }
        devices = [existing(Path(path).absolute()).stat().st_dev for path in (folder, recipe.output_dir)]
        same_disk = devices[0] == devices[1]
        missing = check_room(folder, needed, checkpoint_bytes(recipe, student) if same_disk else 0)
        accelerator.print(f"{folder} will grow by {missing / 1e9:,.1f} GB of teachers' outputs for {images:,} images")
        files = {name: one.fingerprint for name, one in ImageStream(recipe.data, [1], 1, 0).sources.items()}
        return {
            cache: cache_fingerprint(
                recipe.teachers[name],
                f"{shapes[name].weights}-{layers[name]:08x}",
                shapes[name].image_size,
                recipe.data,
                files,
                largest_side[cache],
            )
            for cache, name in teacher_of.items()
        }

    return TeacherCaches(accelerator, folder, on_main_process(accelerator, check_and_describe), served)


def _layers(teacher: Teacher) -> int:
    """A checksum of a teacher's layers: the same weights with another activation give other outputs."""
    return zlib.crc32(repr(teacher).replace("FSDP", "").encode())  # sharding renames the layers


def _place(teacher: Teacher, spec: TeacherRecipe, device: torch.device, mesh: DeviceMesh | None) -> Teacher:
    """Moves a teacher where the recipe wants it. Sharded or offloaded blocks are never all on the device at once."""
    blocks = list(stack(teacher.model))
    if mesh is not None:
        for block in blocks:
            fully_shard(block.to(device), mesh=mesh)
            # Each block is its own root, which FSDP2 would keep whole after the forward pass.
            block.register_forward_hook(lambda block, *_: block.reshard())
    if spec.placement == "offloaded":
        offload(teacher, blocks, device)
    else:
        teacher.to(device)
    if spec.compile:
        teacher.encode = torch.compile(teacher.encode)  # type: ignore[method-assign]
    return teacher


def offload(teacher: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Moves all but the blocks to the device. A block is copied there while the block before it computes, and dropped
    after its own turn; its weights stay in pinned memory, and nothing is copied back."""
    # Without CUDA, a block is copied when its turn comes.
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    homes = [
        [(tensor, tensor.data if copies is None else tensor.data.pin_memory()) for tensor in _tensors(block)]
        for block in blocks
    ]
    in_blocks = {id(tensor) for home in homes for tensor, _ in home}
    for tensor in _tensors(teacher):
        if id(tensor) not in in_blocks:
            tensor.data = tensor.data.to(device)
    fetched = set[int]()

    def fetch(index: int) -> None:
        if index in fetched or index >= len(blocks):
            return
        fetched.add(index)
        with torch.cuda.stream(copies):
            for tensor, pinned in homes[index]:
                tensor.data = pinned.to(device, non_blocking=True)

    def before(index: int) -> None:
        fetch(index)
        if copies is not None:
            compute = torch.cuda.current_stream(device)
            compute.wait_stream(copies)
            for tensor, _ in homes[index]:
                tensor.data.record_stream(compute)  # its memory is free again after this block, not before
            fetch(index + 1)

    def after(index: int) -> None:
        fetched.discard(index)
        for tensor, pinned in homes[index]:
            tensor.data = pinned

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: before(index))
        block.register_forward_hook(lambda *_, index=index: after(index))
        after(index)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def stack(network: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a transformer, which hold nearly all of its weights; the network itself where there are none."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    stacks = [stack for stack in lists if len(stack) > 1]
    if not stacks:
        return [network]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())).children()
