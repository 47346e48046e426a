"""Zero-shot classification with the text encoder of the teacher whose space the summaries share (paper, 3.1)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm

from transformers_radio.evaluation.images.labelled import check_labelled

Template = str | Callable[[str], str]


def openai_imagenet_templates() -> Sequence[Template]:
    """The 80 prompt templates OpenAI published for ImageNet, which the paper's protocol uses (from open_clip)."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # only this function needs the package

    return OPENAI_IMAGENET_TEMPLATES


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[list[str]], torch.Tensor], class_names: Sequence[str], templates: Sequence[Template]
) -> torch.Tensor:
    """One unit vector a class, float32 (C, D): every prompt normalised, their mean, normalised again.

    Args:
        encode_text: a list of texts -> (len(texts), D), of any scale.
        class_names: the C names, in the order of the labels.
        templates: functions from a class name to a prompt, or strings with one `{}` for the name.
    """
    if isinstance(class_names, str) or isinstance(templates, str) or not class_names or not templates:
        raise ValueError(f"Expected lists of class names and templates; got {class_names!r} and {templates!r}.")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} for the class name: classes would be equal.")
    classifier = []
    for name in tqdm(class_names, desc="zero-shot classes", unit="class"):
        prompts = [template.format(name) if isinstance(template, str) else template(name) for template in templates]
        embeddings = encode_text(prompts)
        if embeddings.ndim != 2 or len(embeddings) != len(prompts):
            raise ValueError(
                f"encode_text returned {tuple(embeddings.shape)} for {len(prompts)} texts; expected (N, D)."
            )
        embeddings = F.normalize(embeddings.float(), dim=1)  # (templates, D)
        classifier.append(F.normalize(embeddings.mean(dim=0), dim=0))
    return torch.stack(classifier)


@torch.no_grad()
def zero_shot_accuracy(embeddings: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the images whose most similar class is their label; equal similarities go to the lowest class index.

    Args:
        embeddings: (N, D) summaries in the text encoder's space, any float dtype and any scale.
        classifier: (C, D) from `zero_shot_classifier`.
        labels: integers (N,), 0 to C - 1.
    """
    check_labelled(embeddings, labels, "embeddings")
    check_classifier(classifier, embeddings.shape[1])
    if labels.max() >= len(classifier):
        raise ValueError(f"A label is {labels.max()}, but the classifier has only {len(classifier)} classes.")
    predictions = zero_shot_predictions(embeddings, classifier)
    return 100 * (predictions == labels.to(embeddings.device)).float().mean().item()


def zero_shot_predictions(embeddings: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """The most similar class of each embedding: (N, D) and (C, D) -> int64 (N,) on the embeddings' device."""
    # The length of an embedding scales all of its similarities alike, so the arg-max needs no normalising.
    return (embeddings.float() @ classifier.to(embeddings.device).float().T).argmax(dim=1)  # (N, D) (D, C) -> (N, C)


def check_classifier(classifier: torch.Tensor, dim: int) -> None:
    """ValueError unless `classifier` is finite (C, dim)."""
    if classifier.ndim != 2 or classifier.shape[1] != dim:
        raise ValueError(
            f"The classifier is {tuple(classifier.shape)} and the embeddings have {dim} dimensions; both need the "
            "same last dimension: use the summaries of the adaptor whose teacher encoded the text."
        )
    if not classifier.isfinite().all():
        raise ValueError("The classifier holds NaN or infinite values; check the text encoder that produced it.")
