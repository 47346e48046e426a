"""What a vision encoder is worth: k-NN, zero-shot, throughput, one table, one picture."""

from .features import LabelledImages, extract_summaries, load_labelled_images
from .knn import knn_accuracy
from .report import Row, Table
from .throughput import throughput, throughput_conditions
from .visualize import pca_rgb, teacher_student_figure
from .zero_shot import openai_imagenet_templates, zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "LabelledImages",
    "Row",
    "Table",
    "extract_summaries",
    "knn_accuracy",
    "load_labelled_images",
    "openai_imagenet_templates",
    "pca_rgb",
    "teacher_student_figure",
    "throughput",
    "throughput_conditions",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
