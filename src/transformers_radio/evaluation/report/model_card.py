"""Results as entries of a model card on the Hub."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import TASKS, load_task

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def model_index(model: str, results: Sequence[Result]) -> str | None:
    """The `model-index` of a model card as YAML, or None if no result is of a task that the Hub knows."""
    from huggingface_hub import ModelCardData

    entries = [entry for result in results for entry in eval_results(result)]
    return ModelCardData(model_name=model, eval_results=entries).to_yaml() + "\n" if entries else None


def eval_results(result: Result) -> "list[EvalResult]":
    """One entry per metric, for the metadata of a model card; none for tasks that the Hub does not know."""
    from huggingface_hub import EvalResult

    task = load_task(result.task) if result.task in TASKS else None
    if task is None or task.hub_task is None:
        return []
    task_type, task_name = task.hub_task
    resolution = result.resolution
    arguments = {"protocol": result.protocol, **result.choices, "resolution": resolution, "seed": result.seed}
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=re.sub(r"[\W_]+", "-", result.data.lower()).strip("-") or "unnamed",
            dataset_name=result.data,
            metric_type=task.hub_metrics.get(name) or task.hub_metrics.get(name.split()[-1], "accuracy"),
            metric_name=name,
            metric_value=value,
            metric_config=None if resolution is None else f"{resolution} px",
            metric_args={key: value for key, value in arguments.items() if value is not None} | result.counts,
        )
        for name, value in result.metrics.items()
        if value >= 0  # COCO gives -1 if there is no object of a size
    ]
