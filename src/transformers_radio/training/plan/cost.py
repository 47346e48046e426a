"""What a stage demands from each process on real GPUs: time and memory, from FLOPs and data sheets."""

from dataclasses import dataclass

from torch import nn

from transformers_radio.training.groups import Group
from transformers_radio.training.teachers import stack

from .count import Plan
from .gpus import GPU

STEPS_LOOKED_AT = 10_000  # over which the turns of groups with a rate below 1 are averaged


@dataclass(frozen=True)
class Load:
    """What each of the processes that serve the same groups of a stage computes and holds.

    Attributes:
        ranks: these processes.
        groups: the groups that each of them serves, in turn.
        half_flops, float32_flops: group -> FLOPs per step in which it takes part, by the precision they run in.
        state_bytes: float32 weights, gradients, AdamW's two moments, and the moving average if there is one.
        bucket_bytes: DDP's copy of the gradients.
        activation_bytes: what the largest pass keeps for its backward pass.
        teacher_bytes: weights on the process's device of the teachers that it serves in any stage.
    """

    ranks: tuple[int, ...]
    groups: tuple[Group, ...]
    half_flops: dict[str, float]
    float32_flops: dict[str, float]
    state_bytes: int
    bucket_bytes: int
    activation_bytes: int
    teacher_bytes: float

    def group_seconds(self, name: str, gpu: GPU, utilization: float) -> float:
        """Seconds per step spent on one group."""
        half, full = self.half_flops[name] / gpu.half_tflops, self.float32_flops[name] / gpu.float32_tflops
        return (half + full) / 1e12 / utilization

    def memory(self, processes: int, fsdp: bool) -> float:
        """Bytes: all weights, gradients and moments with DDP, this process's part of them with FSDP2."""
        states = self.state_bytes / processes if fsdp else self.state_bytes + self.bucket_bytes
        return states + self.activation_bytes + self.teacher_bytes


@dataclass(frozen=True)
class StageTime:
    """The average step of a stage, over the turns of its groups. A step lasts as long as its slowest process.

    Attributes:
        seconds: per step.
        bound_by: the groups of the processes that the others wait for most of the time.
        busy: a load's ranks -> the share of the time in which they compute instead of waiting for the slowest.
    """

    seconds: float
    bound_by: tuple[str, ...]
    busy: dict[tuple[int, ...], float]


def stage_loads(plan: Plan, stage: str) -> list[Load]:
    """The loads of a stage's processes, in the order of their numbers."""
    groups, parameters = plan.groups[stage], _parameters(plan, stage)
    served: dict[tuple[str, ...], list[int]] = {}
    for rank in range(plan.processes):
        served.setdefault(tuple(group.name for group in groups if rank in group.ranks), []).append(rank)
    loads = []
    for names, ranks in served.items():
        own = tuple(group for group in groups if group.name in names)
        flops = {group.name: _step_flops(plan, stage, group) for group in own}
        loads.append(
            Load(
                ranks=tuple(ranks),
                groups=own,
                half_flops={name: half for name, (half, _) in flops.items()},
                float32_flops={name: full for name, (_, full) in flops.items()},
                state_bytes=parameters * (16 if plan.recipe.ema_decay is None else 20),
                bucket_bytes=4 * parameters if plan.processes > 1 else 0,
                activation_bytes=max(plan.steps[stage][name].activation_bytes for name in names),
                teacher_bytes=max(_teacher_bytes(plan, rank) for rank in ranks),
            )
        )
    return loads


def _parameters(plan: Plan, stage: str) -> int:
    """They are the same for all groups of a stage."""
    return next(iter(plan.steps[stage].values())).parameters


def _step_flops(plan: Plan, stage: str, group: Group) -> tuple[float, float]:
    """FLOPs per process and step in which the group takes part: in half precision, and in float32."""
    recipe, cost = plan.recipe, plan.steps[stage][group.name]
    saved = cost.attention_flops * plan.student.attention_saving(group.resolution, group.resolution)
    # precision -> FLOPs per image
    flops = {"half": 0.0, "float32": 0.0}
    flops["float32" if recipe.mixed_precision == "no" else "half"] += cost.flops - saved
    for name in group.teachers:
        flops["float32" if recipe.teachers[name].dtype == "float32" else "half"] += plan.teacher_costs[name].flops
    images = group.passes * group.micro_batch_size
    return images * flops["half"], images * flops["float32"]


def stage_time(loads: list[Load], steps: int, gpu: GPU, utilization: float) -> StageTime:
    """How long the steps of a stage take.

    Args:
        steps: number of steps of the stage.
        utilization: share of the GPU's peak that the arithmetic reaches, in (0, 1].
    """
    seconds = {
        (load.ranks, group.name): load.group_seconds(group.name, gpu, utilization)
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


def _teacher_bytes(plan: Plan, rank: int) -> float:
    """Bytes of teachers' weights on a process's device, over all stages.

    A teacher that is sharded or offloaded has at most two whole blocks there: the one that computes, and the next.
    """
    placed: dict[str, tuple[str, int]] = {}
    for group in (group for groups in plan.groups.values() for group in groups if rank in group.ranks):
        placed |= {name: (plan.recipe.teachers[name].placement, len(group.ranks)) for name in group.teachers}
    total = 0.0
    for name, (placement, ranks) in placed.items():
        whole = _bytes(plan.teachers[name])
        if placement == "device":
            total += whole
        else:
            blocks = sorted(_bytes(block) for block in stack(plan.teachers[name].model))
            share = sum(blocks) / ranks if placement == "sharded" else 0.0
            total += whole - sum(blocks) + share + sum(blocks[-2:])
    return total


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
