"""What a vision encoder is worth: k-NN, zero-shot, throughput, one table, one picture."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .features import LabelledImages as LabelledImages
    from .features import extract_summaries as extract_summaries
    from .features import load_labelled_images as load_labelled_images
    from .knn import knn_accuracy as knn_accuracy
    from .report import Row as Row
    from .report import Table as Table
    from .timing import throughput as throughput
    from .timing import throughput_conditions as throughput_conditions
    from .visualize import pca_rgb as pca_rgb
    from .visualize import teacher_student_figure as teacher_student_figure
    from .zero_shot import openai_imagenet_templates as openai_imagenet_templates
    from .zero_shot import zero_shot_accuracy as zero_shot_accuracy
    from .zero_shot import zero_shot_classifier as zero_shot_classifier

_MODULES = {
    "LabelledImages": "features",
    "Row": "report",
    "Table": "report",
    "extract_summaries": "features",
    "knn_accuracy": "knn",
    "load_labelled_images": "features",
    "openai_imagenet_templates": "zero_shot",
    "pca_rgb": "visualize",
    "teacher_student_figure": "visualize",
    "throughput": "timing",
    "throughput_conditions": "timing",
    "zero_shot_accuracy": "zero_shot",
    "zero_shot_classifier": "zero_shot",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a mistyped task or model is named before
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
