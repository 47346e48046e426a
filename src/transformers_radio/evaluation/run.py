"""`transformers-radio eval TASK`: a task's settings from its recipe and `key=value`, then the task itself."""

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .hub_names import check_model
from .results import Result, slug

# task -> its module and its settings
TASKS = {
    "knn": ("knn", "KnnConfig"),
    "zero-shot": ("zero_shot", "ZeroShotConfig"),
    "segmentation": ("segmentation", "SegmentationTaskConfig"),
    "sam-coco": ("sam_coco", "SamCocoTaskConfig"),
    "llava": ("llava", "LlavaConfig"),
    "throughput": ("throughput", "ThroughputConfig"),
    "resolution": ("resolution", "ResolutionConfig"),
    "features": ("features", "FeaturesConfig"),
}
# Their work is not spread over processes: each would do all of it, and write the same files.
ONE_PROCESS = ("sam-coco", "throughput", "resolution", "features")
PICTURES = ("features", "attention", "positions", "heat-map", "masks")  # of `transformers-radio visualize`


def run_task(
    task: str,
    models: list[str],
    data: str | None = None,
    recipe: str | Path | None = None,
    output: str | Path = "runs/eval",
    overrides: list[str] | None = None,
) -> list[Result]:
    """Measure; what is finished in `output` with the same settings is not done again.

    Args:
        task: one of `TASKS`.
        models: see `encoder.load_encoder`.
        data: the field `data` of the task's settings.
        recipe: a YAML file of settings, such as those in recipes/evaluation/.
        output: OUTPUT/<model>/<task>.<data>.json holds a result.
        overrides: `key=value`, over the recipe's.

    Raises:
        ValueError: an unknown task or setting, a missing one, two models of one name, more processes than the task
            can use, or what the task itself refuses.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}: use one of {', '.join(TASKS)}.")
    if not models:
        raise ValueError("There is no model to evaluate: name at least one with --model.")
    _check_form(recipe, overrides)
    for model in models:
        check_model(model)
    from .encoder import split_title  # torch comes with these: what is mistyped has been named
    from .summary_store import start_processes

    module_name, config_name = TASKS[task]
    module = importlib.import_module(f"transformers_radio.evaluation.tasks.{module_name}")
    config = load_config(getattr(module, config_name), data, recipe, overrides)
    if task in ONE_PROCESS and (processes := start_processes().num_processes) > 1:
        raise ValueError(
            f"eval {task} runs in one process, but {processes} were started: run it without accelerate launch, the "
            "models in commands of their own where there are several devices."
        )
    names = [slug(split_title(model)[0]) for model in models]
    if len(set(names)) < len(names):  # they would share their files
        raise ValueError(f"Two of {', '.join(models)} have one name: give them titles, as TITLE=MODEL.")
    return module.run(models, config, Path(output))


def check_pictures(kind: str, models: list[str], recipe: str | Path | None, overrides: list[str] | None) -> None:
    """Of `transformers-radio visualize`, before torch is loaded.

    Raises:
        FileNotFoundError, ValueError: an unknown kind or type of model, no model, a file or model that is not there.
    """
    if kind not in (*PICTURES, "all"):
        raise ValueError(f"There is no picture {kind!r}: use one of {', '.join(PICTURES)}, or all.")
    if not models:
        raise ValueError("There is no model to show: name at least one with --model.")
    _check_form(recipe, overrides)
    for model in models:
        check_model(model)


def _check_form(recipe: str | Path | None, overrides: list[str] | None) -> None:
    if recipe is not None and not Path(recipe).is_file():
        raise FileNotFoundError(f"There is no recipe {recipe}; recipes are YAML files, see recipes/evaluation/.")
    for override in overrides or []:
        if "=" not in override:
            raise ValueError(f"{override!r} is not of the form key=value, such as k=20.")


def load_config(schema: type, data: str | None, recipe: str | Path | None, overrides: list[str] | None) -> Any:
    """The task's settings, checked against its fields; the overrides win over the recipe, `data` over both."""
    where = "the settings" if recipe is None else str(recipe)
    try:
        parts = [OmegaConf.structured(schema)]
        if recipe is not None:
            parts.append(OmegaConf.load(recipe))
        parts.append(OmegaConf.from_dotlist(list(overrides or [])))
        if data is not None:
            nested = OmegaConf.is_config(parts[0].data) if not OmegaConf.is_missing(parts[0], "data") else False
            parts.append(OmegaConf.create({"data": {"path": data} if nested else data}))
        return OmegaConf.to_object(OmegaConf.merge(*parts))
    except OmegaConfBaseException as error:
        names = ", ".join(f.name for f in fields(schema))
        raise ValueError(f"{where}: {str(error).splitlines()[0]}. The settings are {names}.") from error
