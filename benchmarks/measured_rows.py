"""What the studies on the quickstart's world share: a row is a recipe, trained and measured once, and kept."""

import hashlib
import json
import statistics
from pathlib import Path

from transformers_radio.disk import write_text
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.quickstart.measure import Yardstick, measure
from transformers_radio.quickstart.run import FOLDER
from transformers_radio.training import Recipe, train
from transformers_radio.training.recipe import recipe_to_dict


def measure_row(recipe: Recipe, runs: Path, yardstick: Yardstick) -> dict[str, float | None]:
    """Trains and measures, unless this very recipe was measured before: a row is known by all of its fields.

    Returns:
        The columns of the quickstart's table, and the mean of each term of the loss over the last fifth of the steps,
        as "clip/features".
    """
    result, run = row_paths(recipe, runs)
    if not result.exists():
        recipe.output_dir = str(run)
        outcome = train(recipe)
        if outcome.student_dir is None:
            raise SystemExit("stopped; run the same command again to go on")
        adaptor = "clip" if "clip" in recipe.teachers else None
        metrics = measure(load_encoder(str(outcome.student_dir), adaptor=adaptor), yardstick)
        write_text(result, json.dumps({**metrics, **last_losses(run)}) + "\n")
    return json.loads(result.read_text(encoding="utf-8"))


def row_paths(recipe: Recipe, runs: Path) -> tuple[Path, Path]:
    """The file of a row's result, and the folder of its run. The study's folder and the package may have moved."""
    fields = {**recipe_to_dict(recipe), "output_dir": "", "teacher_cache": None}
    text = json.dumps(fields).replace(str(FOLDER), "").replace(str(runs.parent), "")
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return runs / f"{key}.json", runs / key


def last_losses(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-max(1, len(lines) // 5) :]
    return {name: statistics.mean(line[name] for line in last) for name in last[0] if "/" in name}


def mean_and_spread(values: list[float | None], digits: int = 1) -> str:
    """Such as "83.1 ± 0.4", with the standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"
