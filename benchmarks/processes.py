"""One process of two threads against two processes of one thread: `make bench`, or `python benchmarks/processes.py`.

Both train the quickstart's student on the same images, by the same command as a user's. Rounds of both alternate, and
the medians are compared. Needs a machine with two cores, and nothing else running on it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

from omegaconf import OmegaConf

from transformers_radio.quickstart.run import VIT_RECIPE
from transformers_radio.quickstart.world import make_world

ROUNDS = 5
STEPS = 40
UNTIMED = 8  # steps of each round that fill the pipeline and warm the allocator


def write_recipe(folder: Path, world: Path) -> Path:
    """The quickstart's with one group, whose images are dealt out evenly."""
    recipe = OmegaConf.load(VIT_RECIPE)
    stage = {"steps": STEPS, "warmup_steps": 4, "resolution": 64, "batch_size": 32}
    recipe.stages = {"main": stage}
    recipe.data.path = str(world)
    recipe.checkpoints.every_steps = 1000
    recipe.log_every_steps = 1
    OmegaConf.save(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def images_per_second(recipe: Path, processes: int, threads: int) -> float:
    """The median of the run's own log."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    folder = recipe.parent / "run"
    subprocess.run(
        [*launch, "-m", "transformers_radio.training", str(recipe), f"output_dir={folder}", "overwrite=true"],
        check=True,
        capture_output=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[UNTIMED:])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", train=512, validation=2).directory
        recipe = write_recipe(Path(folder), world)
        pairs = []
        for number in range(ROUNDS):
            shapes = [(1, 2), (2, 1)] if number % 2 == 0 else [(2, 1), (1, 2)]  # take turns in coming first
            speed = {shape: images_per_second(recipe, *shape) for shape in shapes}
            pairs.append((speed[1, 2], speed[2, 1]))
            print(
                f"round {number + 1}: 1 x 2 threads {pairs[-1][0]:.0f} images/s, 2 x 1 {pairs[-1][1]:.0f}", flush=True
            )
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(two / one for one, two in pairs)
        print(f"median: 1 x 2 threads {one:.0f} images/s, 2 x 1 thread {two:.0f}; ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
