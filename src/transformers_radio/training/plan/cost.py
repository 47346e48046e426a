"""What a stage asks of each process on real GPUs: time and memory, from FLOPs and data sheets."""

from dataclasses import dataclass

from torch import nn

from transformers_radio.modeling import RadioConfig
from transformers_radio.teachers import Teacher
from transformers_radio.training.groups import Group
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.teachers import stack

from .dry_run import StepCost, TeacherCost, window_saving
from .gpus import GPU

STEPS_LOOKED_AT = 10_000  # over which the turns of groups with a rate below 1 are averaged


@dataclass(frozen=True)
class Load:
    """What the processes that serve the same groups of a stage do and hold, each of them.

    Attributes:
        ranks: these processes.
        groups: what they serve, in turn.
        half_flops, float32_flops: group -> FLOPs of a step in which it takes part, by the precision they run in.
        state_bytes: float32 weights, gradients, AdamW's two moments, and the moving average if there is one.
        bucket_bytes: DDP's copy of the gradients.
        activation_bytes: of the largest pass.
        teacher_bytes: weights of the teachers that the process serves in any stage, where they are on its device.
    """

    ranks: tuple[int, ...]
    groups: tuple[Group, ...]
    half_flops: dict[str, float]
    float32_flops: dict[str, float]
    state_bytes: int
    bucket_bytes: int
    activation_bytes: int
    teacher_bytes: float

    def group_seconds(self, name: str, gpu: GPU, utilisation: float) -> float:
        """Of a step, spent on one group."""
        half, full = self.half_flops[name] / gpu.half_tflops, self.float32_flops[name] / gpu.float32_tflops
        return (half + full) / 1e12 / utilisation

    def memory(self, processes: int, fsdp: bool) -> float:
        """Bytes: with DDP everything, with FSDP2 this process's part of weights, gradients and moments."""
        states = self.state_bytes / processes if fsdp else self.state_bytes + self.bucket_bytes
        return states + self.activation_bytes + self.teacher_bytes


@dataclass(frozen=True)
class StageTime:
    """Of a stage's steps, on average over the turns of its groups. A step lasts as long as its slowest process.

    Attributes:
        seconds: of a step.
        bound_by: the groups of the processes that the others wait for most of the time.
        busy: load's ranks -> the share of the time that they compute, and do not wait for the slowest.
    """

    seconds: float
    bound_by: tuple[str, ...]
    busy: dict[tuple[int, ...], float]


def stage_loads(
    recipe: Recipe,
    stage: str,
    groups: dict[str, list[Group]],
    processes: int,
    config: RadioConfig,
    steps: dict[str, StepCost],
    teachers: dict[str, Teacher],
    teacher_costs: dict[str, TeacherCost],
) -> list[Load]:
    """The loads of a stage's processes, in their order.

    Args:
        groups: stage -> its groups.
        config: of the student.
        steps: group -> the cost of its pass.
    """
    served: dict[tuple[str, ...], list[int]] = {}
    for rank in range(processes):
        served.setdefault(tuple(g.name for g in groups[stage] if rank in g.ranks), []).append(rank)
    loads = []
    for names, ranks in served.items():
        own = tuple(group for group in groups[stage] if group.name in names)
        half, full = {}, {}
        for group in own:
            images = group.passes * group.micro_batch_size
            cost = steps[group.name]
            flops = cost.flops - cost.attention_flops * window_saving(config, group.resolution)
            in_half = flops if recipe.mixed_precision != "no" else 0.0
            in_full = flops - in_half
            for name in group.teachers:
                if recipe.teachers[name].dtype == "float32":
                    in_full += teacher_costs[name].flops
                else:
                    in_half += teacher_costs[name].flops
            half[group.name], full[group.name] = images * in_half, images * in_full
        parameters = steps[own[0].name].parameters  # the same for all groups of a stage
        loads.append(
            Load(
                ranks=tuple(ranks),
                groups=own,
                half_flops=half,
                float32_flops=full,
                state_bytes=parameters * (16 if recipe.ema_decay is None else 20),
                bucket_bytes=4 * parameters if processes > 1 else 0,
                activation_bytes=max(steps[group.name].activation_bytes for group in own),
                teacher_bytes=max(_teacher_bytes(recipe, groups, rank, teachers) for rank in ranks),
            )
        )
    return loads


def stage_time(loads: list[Load], steps: int, gpu: GPU, utilisation: float) -> StageTime:
    """How long the steps of a stage take.

    Args:
        steps: of the stage.
        utilisation: share of the GPU's peak that the arithmetic reaches, in (0, 1].
    """
    seconds = {
        (load.ranks, group.name): load.group_seconds(group.name, gpu, utilisation)
        for load in loads
        for group in load.groups
    }
    looked_at = min(steps, STEPS_LOOKED_AT)
    total, busy, slowest = 0.0, dict.fromkeys((load.ranks for load in loads), 0.0), [0.0] * len(loads)
    for step in range(looked_at):
        times = [
            sum(seconds[load.ranks, group.name] for group in load.groups if group.takes_part(step)) for load in loads
        ]
        total += max(times)
        slowest[times.index(max(times))] += max(times)
        for load, time in zip(loads, times, strict=True):
            busy[load.ranks] += time
    bound_by = loads[slowest.index(max(slowest))]
    return StageTime(
        seconds=total / looked_at,
        bound_by=tuple(group.name for group in bound_by.groups),
        busy={ranks: time / total for ranks, time in busy.items()},
    )


def uneven_shares(groups: list[Group], shares: dict[str, float], processes: int) -> bool:
    """Whether the processes of a stage's groups are not in the proportion of their shares."""
    total = sum(shares.values())
    return any(abs(len(group.ranks) * total - shares[group.name] * processes) > 1e-6 * total for group in groups)


def _teacher_bytes(recipe: Recipe, groups: dict[str, list[Group]], rank: int, teachers: dict[str, Teacher]) -> float:
    """Of the weights on this process's device: whole, or but for two blocks sharded or elsewhere (the block that
    computes, and the one on its way)."""
    placed: dict[str, tuple[str, int]] = {}
    for group in (group for stage in groups.values() for group in stage if rank in group.ranks):
        placed |= {name: (recipe.teachers[name].placement, len(group.ranks)) for name in group.teachers}
    total = 0.0
    for name, (placement, ranks) in placed.items():
        whole = _bytes(teachers[name])
        if placement == "device":
            total += whole
        else:
            blocks = sorted(_bytes(block) for block in stack(teachers[name].model))
            share = sum(blocks) / ranks if placement == "sharded" else 0.0
            total += whole - sum(blocks) + share + sum(blocks[-2:])
    return total


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
