"""The quickstart's table in the model card of its student."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard

from transformers_radio.publishing.card import add_evaluation

DATA = "quickstart-scenes"
# column of the table -> the Hub's type and name of the task, and of the metric
TASKS = {
    "Zero-shot": ("zero-shot-image-classification", "Zero-Shot Image Classification", "accuracy"),
    "k-NN": ("image-classification", "Image Classification", "accuracy"),
    "mIoU": ("image-segmentation", "Image Segmentation", "mean_iou"),
    "Masks": ("mask-generation", "Mask Generation", "mean_iou"),
}


def add_quickstart(card: ModelCard, text: str, metrics: dict[str, float | None]) -> None:
    """Puts the table and the student's figures into its card, and names the data.

    Args:
        text: the table with its notes, Markdown.
        metrics: column -> percent, of the student's row.
    """
    entries = [
        EvalResult(
            task_type=TASKS[name][0],
            task_name=TASKS[name][1],
            dataset_type=DATA,
            dataset_name="Quickstart scenes",
            metric_type=TASKS[name][2],
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if name in TASKS and value is not None
    ]
    data: Any = card.data
    data.datasets = [DATA]
    add_evaluation(card, text, entries, "quickstart")
