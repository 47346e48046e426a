"""A step of radio_vit_h16.yaml, as one GPU of its 64 runs it, with teachers of the real shapes and random weights."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from measure import GIB, Case, Setup, compiled_blocks, peak_memory, seconds, share
from torch import nn
from training_runs import kill_and_resume, overhead

from transformers_radio.data import Batch
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher
from transformers_radio.training import Recipe, load_recipe
from transformers_radio.training.distill import (
    Distillation,
    build_distillation,
    teacher_targets,
)
from transformers_radio.training.groups import Group, stage_groups
from transformers_radio.training.optimizer import build_optimizer
from transformers_radio.training.plan.cost import stage_loads
from transformers_radio.training.plan.count import Plan, describe_student, describe_teacher
from transformers_radio.training.plan.dry_run import run_stage, run_teacher
from transformers_radio.training.plan.gpus import GPUS
from transformers_radio.training.stability.spectral import power_steps
from transformers_radio.training.streams import to_device
from transformers_radio.training.student import TeacherShape, build_student

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "radio_vit_h16.yaml"
GROUPS = (("base", "all"), ("high", "low"), ("high", "high"))
TEACHERS = "package:quickstart/teachers"
DRY = [
    *("student.size=vit-ti-16", "student.config.num_hidden_layers=2", "student.config.max_img_size=128"),
    "student.config.train_window_sizes=[2, 4]",
    *(f"teachers.{name}.checkpoint={TEACHERS}/clip" for name in ("clip", "openai_clip")),
    *(f"teachers.dinov2.checkpoint={TEACHERS}/dinov2", "teachers.dinov2.image_size=null"),
    f"teachers.sam.checkpoint={TEACHERS}/sam/sam.pth",
    *("stages.base.resolution=64", "stages.base.micro_batch_size=2"),
    *("stages.high.groups.low.resolution=64", "stages.high.groups.low.micro_batch_size=2"),
    *("stages.high.groups.high.resolution=128", "stages.high.groups.high.micro_batch_size=1"),
]


def cases(setup: Setup) -> list[Case]:
    steps = {
        (way, group): Case(f"{'.'.join(group)} {way}", partial(measure, way, *group, setup), limit=150)
        for way in ("eager", "checkpointed", "compiled")
        for group in GROUPS
    }
    first = [("eager", group) for group in GROUPS]
    then = [("compiled", ("high", "low")), ("checkpointed", ("high", "high"))]  # all that a dry run has of them
    rest = [] if setup.dry else [key for key in steps if key not in first + then]
    runs = [
        Case("overhead of train", partial(overhead, setup), limit=120),
        Case("kill -9 and resume", partial(kill_and_resume, setup), limit=150),
    ]
    return [*(steps[key] for key in first), *runs, *(steps[key] for key in [*then, *rest])]


def measure(way: str, stage: str, group_name: str, setup: Setup) -> dict[str, Any]:
    """Time, share of the peak and memory of a step, the last beside what `plan` predicts. Attention is global.

    What checkpointing computes again counts as work. `graphs`: functions compiled; torch leaves the blocks beyond its
    limit of eight as they are.
    """
    recipe = load_recipe(RECIPE, DRY if setup.dry else [])
    recipe.student = replace(recipe.student, gradient_checkpointing=way == "checkpointed")
    group = next(g for g in stage_groups(stage, recipe.stages[stage], list(recipe.teachers)) if g.name == group_name)
    group = replace(group, batch_size=group.micro_batch_size, passes=1)  # what one of 64 processes does
    flops, planned = predict(recipe, stage, group)
    described = {name: describe_teacher(name, recipe.teachers[name]) for name in recipe.teachers}
    teachers = {name: random_weights(described[name], setup.device) for name in group.teachers}
    with torch.device(setup.device):
        student = build_student(recipe, {name: TeacherShape.of(teacher) for name, teacher in described.items()})
    model = build_distillation(recipe, stage, student).train()
    run = bare_step(recipe, stage, group, model, teachers, setup.device)
    torch._dynamo.utils.counters.clear()
    compiled = compiled_blocks(model.student.encoder, setup) if way == "compiled" else nullcontext()
    with compiled, peak_memory(setup.device) as peak:
        took = seconds(run, setup, budget=1.5)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sheet = data_sheet(setup)
    return {
        "ms": 1e3 * took,
        "images/s": group.micro_batch_size / took,
        "TFLOPs/step": flops / 1e12,
        "% of peak": share(flops, took, setup),
        "% of data sheet": None if sheet is None else 100 * flops / took / 1e12 / sheet,
        **peak,
        "plan GiB": planned / GIB,
        "peak/plan": peak["peak GiB"] / (planned / GIB),
        **({"graphs": graphs} if way == "compiled" else {}),
    }


def predict(recipe: Recipe, stage: str, group: Group) -> tuple[float, float]:
    """FLOPs of a step with global attention, and bytes, by the functions behind `plan`."""
    described = {name: describe_teacher(name, spec) for name, spec in recipe.teachers.items()}
    costs = {name: run_teacher(described[name]) for name in group.teachers}
    student = describe_student(recipe, described)
    outputs = {name: cost.output for name, cost in costs.items()}
    steps = run_stage(recipe, stage, [group], student, outputs)
    (load,) = stage_loads(Plan(recipe, 1, {stage: [group]}, described, student, costs, {stage: steps}), stage)
    flops = steps[group.name].flops + sum(cost.flops for cost in costs.values())
    return group.micro_batch_size * flops, load.memory(1, fsdp=False)


def bare_step(
    recipe: Recipe, stage: str, group: Group, model: Distillation, teachers: dict[str, Teacher], device: torch.device
) -> Callable[[], None]:
    """A step of nothing but models, losses and optimizer, on images that are on the device."""
    student: RadioModel = model.student
    optimizer = build_optimizer(model, recipe, recipe.stages[stage])
    sides = {group.resolution, *(teacher.image_size for teacher in teachers.values())}
    count = group.micro_batch_size
    # channels last, as batches are
    pixels = {side: torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=device) for side in sides}
    batch = Batch({side: images.permute(0, 3, 1, 2) for side, images in pixels.items()}, [], [], 0, {})
    dtype = torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16

    def run() -> None:
        if recipe.student.spectral_reparam:
            power_steps(student)
        images = to_device(batch, device)
        targets = teacher_targets(teachers, images)
        with torch.autocast(device.type, dtype, enabled=recipe.mixed_precision != "no"):
            totals, _ = model(images[group.resolution], targets, window_size=0)
        totals.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


@torch.no_grad()
def random_weights(teacher: Teacher, device: torch.device | str) -> Teacher:
    """Gives a teacher on the meta device memory and random weights, with which no activation overflows."""
    teacher.to_empty(device=device)
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.ndim < 2 and name.endswith("weight"):  # of norms
            tensor.fill_(1)
        else:
            tensor.normal_(std=0.02)
    teacher.mean.fill_(0.5)
    teacher.std.fill_(0.25)
    return teacher


def data_sheet(setup: Setup) -> float | None:
    """TFLOP/s of this card in bfloat16 that `plan` counts with; None for one that it does not know."""
    name = torch.cuda.get_device_name(setup.device).lower() if setup.device.type == "cuda" else ""
    return next((gpu.half_tflops for known, gpu in GPUS.items() if known.split("-")[0] in name), None)
