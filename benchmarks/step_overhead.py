"""What the training loop costs over the bare models: `make bench`, or `python benchmarks/step_overhead.py`.

Both sides train the same student from the quickstart's three teachers on the same stream of images. One side is
`transformers_radio.training.train`; the other a plain loop of forward, losses, backward and AdamW. Rounds of both
alternate in one process and the medians are compared, so that a machine that slows down slows both.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import torch
from torch.nn import functional as F

from transformers_radio.data import ImageStream
from transformers_radio.quickstart.run import VIT_RECIPE
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import load_recipe, train
from transformers_radio.training.recipe import Recipe, StageRecipe
from transformers_radio.training.run.processes import settle_precision
from transformers_radio.training.student import TeacherShape, build_student
from transformers_radio.training.teachers import load_teacher

ROUNDS = 7
STEPS = 24
UNTIMED = 4  # steps of each round that fill the pipeline and warm the allocator


def framework_seconds(recipe: Recipe) -> float:
    """Seconds a step of `train`, from its own log: every step is logged, as no user would."""
    train(recipe)
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    stage = next(iter(recipe.stages.values()))
    return statistics.median(stage.batch_size / line["images_per_second"] for line in lines[UNTIMED:])


def plain_seconds(recipe: Recipe) -> float:
    """Seconds a step of a loop that has nothing but the models, the losses and the optimizer."""
    stage = next(iter(recipe.stages.values()))
    teachers = {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()}
    student = build_student(recipe, {name: TeacherShape.of(teacher) for name, teacher in teachers.items()}).train()
    student.set_attn_implementation(recipe.student.attn_implementation)
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.optimizer.learning_rate, fused=True)
    sides = sorted({stage.resolution, *(teacher.image_size for teacher in teachers.values())})
    stream = ImageStream(recipe.data, resolutions=sides, batch_size=stage.batch_size, seed=recipe.seed)
    batches, seconds = iter(stream), []
    for step in range(STEPS):
        started = time.perf_counter()
        images = {side: pixels.float() / 255 for side, pixels in next(batches).images.items()}
        with torch.no_grad():
            targets = {name: teacher(images[teacher.image_size]) for name, teacher in teachers.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
            heads = student(images[stage.resolution]).adaptors
        loss = torch.zeros(())
        for name, target in targets.items():
            if target.summary is not None:
                loss = loss + 1 - F.cosine_similarity(heads[name].summary.float(), target.summary, dim=-1).mean()
            own = heads[name].grid
            grid = (max(own[0], target.grid[0]), max(own[1], target.grid[1]))
            left = F.interpolate(heads[name].features.float().mT.unflatten(2, own), grid, mode="bilinear")
            right = F.interpolate(target.features.mT.unflatten(2, target.grid), grid, mode="bilinear")
            loss = loss + 0.9 * (1 - F.cosine_similarity(left, right, dim=1).mean())
            loss = loss + 0.1 * F.smooth_l1_loss(left, right, beta=2.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step >= UNTIMED:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", train=512, validation=2)
        overrides = [
            f"output_dir={folder}/run",
            f"data.path={world.directory}",
            "log_every_steps=1",
            "checkpoints.every_steps=1000",
            "overwrite=true",
        ]
        recipe = settle_precision(load_recipe(VIT_RECIPE, overrides))
        # One group of all teachers, so that the plain loop is plain.
        recipe.stages = {"main": StageRecipe(steps=STEPS, resolution=64, batch_size=32, warmup_steps=2)}
        pairs = []
        for number in range(ROUNDS):
            # Whoever comes second finds warm caches: take turns.
            if number % 2:
                plain = plain_seconds(recipe)
                framework = framework_seconds(recipe)
            else:
                framework = framework_seconds(recipe)
                plain = plain_seconds(recipe)
            pairs.append((framework, plain))
            print(
                f"round {number + 1}: train {framework * 1e3:.0f} ms a step, plain loop {plain * 1e3:.0f} ms",
                flush=True,
            )
        framework, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(framework / plain for framework, plain in pairs)
        print(f"median: train {framework * 1e3:.0f} ms a step, plain loop {plain * 1e3:.0f} ms; ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
