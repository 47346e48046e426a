"""What a vision encoder is worth: k-NN, zero-shot, throughput, and one table of the results."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classification.knn import knn_accuracy as knn_accuracy
    from .classification.zero_shot import openai_imagenet_templates as openai_imagenet_templates
    from .classification.zero_shot import zero_shot_accuracy as zero_shot_accuracy
    from .classification.zero_shot import zero_shot_classifier as zero_shot_classifier
    from .images.labeled import LabelledImages as LabelledImages
    from .images.labeled import load_labelled_images as load_labelled_images
    from .images.summaries import extract_summaries as extract_summaries
    from .pca import pca_rgb as pca_rgb
    from .report.table import Row as Row
    from .report.table import Table as Table
    from .speed.timing import throughput as throughput
    from .speed.timing import throughput_conditions as throughput_conditions

_MODULES = {
    "LabelledImages": "images.labeled",
    "Row": "report.table",
    "Table": "report.table",
    "extract_summaries": "images.summaries",
    "knn_accuracy": "classification.knn",
    "load_labelled_images": "images.labeled",
    "openai_imagenet_templates": "classification.zero_shot",
    "pca_rgb": "pca",
    "throughput": "speed.timing",
    "throughput_conditions": "speed.timing",
    "zero_shot_accuracy": "classification.zero_shot",
    "zero_shot_classifier": "classification.zero_shot",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a mistyped task or model is named before
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
