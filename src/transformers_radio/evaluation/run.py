"""`transformers-radio eval TASK`: a task's settings from its recipe and `key=value`, then the task itself."""

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from transformers_radio.evaluation.models.specs import ModelSpec, check_model
from transformers_radio.settings import check_interpolations, quoted

from .paths import expand_home
from .result import Result, slug

if TYPE_CHECKING:
    from .task import Task

# Task -> "module:subclass of Task". The order is that of the report's columns, which is the paper's Table 1.
TASKS = {
    "zero-shot": "transformers_radio.evaluation.classification.zero_shot_task:ZeroShot",
    "knn": "transformers_radio.evaluation.classification.knn_task:Knn",
    "segmentation": "transformers_radio.evaluation.segmentation.task:Segmentation",
    "llava": "transformers_radio.evaluation.llava.task:Llava",
    "sam-coco": "transformers_radio.evaluation.sam_coco.task:SamCoco",
    "throughput": "transformers_radio.evaluation.speed.task:Throughput",
    "resolution": "transformers_radio.evaluation.resolution.task:Resolution",
    "features": "transformers_radio.evaluation.features.task:Features",
}
PICTURES = ("features", "attention", "positions", "heat-map", "masks")  # of `transformers-radio visualize`


def load_task(name: str) -> "type[Task]":
    """The class of a task; torch is imported with it.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}: use one of {', '.join(TASKS)}.")
    module, _, task = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), task)


def run_task(
    task: str,
    models: list[str],
    data: str | None = None,
    recipe: str | Path | None = None,
    output: str | Path = "runs/eval",
    overrides: list[str] | None = None,
) -> list[Result]:
    """Measure; what is finished in `output` with the same settings is not measured again.

    Args:
        task: one of `TASKS`.
        models: see `models.encoder.load_encoder`.
        data: the field `data` of the task's settings.
        recipe: a YAML file of settings, such as those in recipes/evaluation/.
        output: OUTPUT/<model>/<task>.<data>.json holds a result.
        overrides: `key=value`, which win over the recipe's.

    Returns:
        One result per model, in their order.

    Raises:
        ValueError: an unknown task or setting, a missing one, two models of one name, more processes than the task
            can use, or what the task itself refuses.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}: use one of {', '.join(TASKS)}.")
    if not models:
        raise ValueError("There is no model to evaluate: name at least one with --model.")
    models, output = [expand_home(model) for model in models], Path(expand_home(str(output)))
    _check_form(recipe, overrides)
    for model in models:
        check_model(model)
    import torch  # only now: what is mistyped has been named

    from transformers_radio.evaluation.processes import process_state
    from transformers_radio.precision import warn_if_slow

    task_class = load_task(task)
    config = load_config(task_class.config_class, data, recipe, overrides, task_class.passed_over)
    state = process_state()
    if state.num_processes > 1 and not task_class.several_processes:
        raise ValueError(
            f"eval {task} runs in one process, but {state.num_processes} were started: run it without accelerate "
            "launch, the models in commands of their own where there are several devices."
        )
    names = [slug(ModelSpec.parse(model).title) for model in models]
    if len(set(names)) < len(names):  # they would share their files
        raise ValueError(f"Two of {', '.join(models)} have one name: give them titles, as TITLE=MODEL.")
    if state.is_main_process:
        warn_if_slow(asked_precisions(config), torch.device(getattr(config, "device", None) or state.device))
    return task_class(config, output).run(models)


def asked_precisions(config: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Setting -> (the precision that it asks for, what to set if that is slow); "outer.inner" for nested settings."""
    found: dict[str, tuple[str, str]] = {}
    instead = {"dtype": "float32", "mixed_precision": "no"}
    for setting in fields(config):
        name, value = f"{prefix}{setting.name}", getattr(config, setting.name)
        if is_dataclass(value):
            found |= asked_precisions(value, f"{name}.")
        elif setting.name in instead:
            found[name] = (value, instead[setting.name])
        elif setting.name == "bf16" and value:
            found[name] = ("bf16", "false")
    return found


def named_models(path: str | Path, chosen: list[str]) -> list[str]:
    """The models of a YAML file of `TITLE: MODEL` as TITLE=MODEL: all of them, or the `chosen` titles.

    What is chosen and is not a title in the file is a model itself, so that others can be measured beside these.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of models {path}.")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(
            f"{path} holds no models; expected lines of TITLE: MODEL, as in recipes/evaluation/table1.yaml."
        )
    named = [f"{name}={content[name]}" if name in content else name for name in chosen or content]
    for name in named:
        if name.partition("=")[0] in content and ModelSpec.parse(name).type == "python":
            raise ValueError(f"{path} names code, {name}, which would run: give it with --model if you trust it.")
    return named


def check_pictures(kind: str, models: list[str], recipe: str | Path | None, overrides: list[str] | None) -> None:
    """Check the arguments of `transformers-radio visualize`, before torch is loaded.

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
    if recipe is not None and not Path(expand_home(str(recipe))).is_file():
        raise FileNotFoundError(f"There is no recipe {recipe}; recipes are YAML files, see recipes/evaluation/.")
    for override in overrides or []:
        if "=" not in override:
            raise ValueError(f"{override!r} is not of the form key=value, such as k=20.")


def load_config(
    schema: type,
    data: str | None,
    recipe: str | Path | None,
    overrides: list[str] | None,
    passed_over: Sequence[str] = (),
) -> Any:
    """The settings, checked against the fields of `schema`. Overrides win over the recipe, `data` wins over both. `~`
    at the beginning of any of them is the home folder.

    Args:
        passed_over: fields that the recipe may hold although `schema` does not have them.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown or missing setting, or a value of another type; the message has the settings beside it.
    """
    where = "the settings" if recipe is None else str(recipe)
    try:
        parts = [OmegaConf.structured(schema)]
        if recipe is not None:
            written = OmegaConf.load(expand_home(str(recipe)))
            check_interpolations(OmegaConf.to_container(written, resolve=False))
            if isinstance(written, DictConfig):
                written = OmegaConf.masked_copy(written, [str(key) for key in written if key not in passed_over])
            parts.append(written)
        parts.append(OmegaConf.from_dotlist([quoted(schema, override) for override in overrides or []]))
        if data is not None:
            nested = OmegaConf.is_config(parts[0].data) if not OmegaConf.is_missing(parts[0], "data") else False
            parts.append(OmegaConf.create({"data": {"path": data} if nested else data}))
        return _expanded(OmegaConf.to_object(OmegaConf.merge(*parts)))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        level = key.rpartition(".")[0]
        owner = error.object_type if is_dataclass(error.object_type) else schema
        names = ", ".join(f.name for f in fields(owner))
        of_level = f" of {level}" if level and owner is not schema else ""
        reason = f"{key}: {_reason(error, key, [one.name for one in fields(owner)])}".removeprefix(": ")
        raise ValueError(f"{where}: {reason}. The settings{of_level} are {names}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}.") from error


def _reason(error: OmegaConfBaseException, key: str, known: list[str]) -> str:
    """What is wrong with a setting, without OmegaConf's own terms where they are known."""
    if isinstance(error, MissingMandatoryValue):
        return f"it has no value; give one with {'--data' if key == 'data' else f'{key}=...'}"
    if isinstance(error, ConfigKeyError):
        near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
        return f"there is no such setting (did you mean {near[0]}?)" if near else "there is no such setting"
    return str(error).splitlines()[0].rstrip(".")


def _expanded(value: Any) -> Any:
    """The settings with the home folder in place of `~`."""
    if isinstance(value, str):
        return expand_home(value)
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if isinstance(value, dict):
        return {key: _expanded(one) for key, one in value.items()}
    if is_dataclass(value):
        for one in fields(value):
            setattr(value, one.name, _expanded(getattr(value, one.name)))
    return value
