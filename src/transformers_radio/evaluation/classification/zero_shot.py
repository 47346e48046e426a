"""Zero-shot classification with the text encoder of the teacher whose space the summaries share (paper, 3.1)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .metrics import SummaryAccuracy

Template = str | Callable[[str], str]


def openai_imagenet_templates() -> Sequence[Template]:
    """The 80 prompt templates OpenAI published for ImageNet, which the paper's protocol uses (from open_clip)."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # only this function needs the package

    return OPENAI_IMAGENET_TEMPLATES


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[list[str]], torch.Tensor], class_names: Sequence[str], templates: Sequence[Template]
) -> torch.Tensor:
    """One unit vector per class, float32 (C, D): every prompt normalized, their mean, normalized again.

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


class ZeroShotAccuracy(SummaryAccuracy):
    """Percent of the summaries whose most similar class is the right one; a metric of `evaluate`.

    Equal similarities go to the lowest class index.

        metric = ZeroShotAccuracy(zero_shot_classifier(text_encoder, class_names, templates))
        for images, labels in batches:
            metric.add_batch(predictions=encoder.language(images), references=labels)
        metric.compute()  # {"zero_shot_accuracy": 76.9, "images": 50000}

    Args:
        classifier: (C, D) from `zero_shot_classifier`; it is moved to the device of each batch.
    """

    score_name = "zero_shot_accuracy"
    description = "Accuracy of the class whose text embedding is most similar to an image's summary, in percent."

    def __init__(self, classifier: torch.Tensor):
        check_classifier(classifier, classifier.shape[-1])
        self.classifier = classifier
        super().__init__(len(classifier))

    @torch.no_grad()
    def _predict(self, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        for block in blocks:
            check_classifier(self.classifier, block.shape[1])
        # The length of an embedding scales all of its similarities alike, so the arg-max needs no normalizing.
        similarities = (block.float() @ self.classifier.to(block.device).float().T for block in blocks)  # (N, C) each
        return [one.argmax(dim=1) for one in similarities]


def zero_shot_accuracy(embeddings: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the images whose most similar class is their label; see `ZeroShotAccuracy`.

    Args:
        embeddings: (N, D) summaries in the text encoder's space, any float dtype and any scale.
        classifier: (C, D) from `zero_shot_classifier`.
        labels: integers (N,), 0 to C - 1.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a label without a class.
    """
    metric = ZeroShotAccuracy(classifier)
    return metric.compute(predictions=embeddings, references=labels)["zero_shot_accuracy"]


def check_classifier(classifier: torch.Tensor, dim: int) -> None:
    """ValueError unless `classifier` is finite (C, dim)."""
    if classifier.ndim != 2 or classifier.shape[1] != dim:
        raise ValueError(
            f"The classifier is {tuple(classifier.shape)} and the embeddings have {dim} dimensions; both need the "
            "same last dimension: use the summaries of the adaptor whose teacher encoded the text."
        )
    if not classifier.isfinite().all():
        raise ValueError("The classifier holds NaN or infinite values; check the text encoder that produced it.")
