"""The distillation losses of AM-RADIO (paper section 3.4, equations 1 to 3): one value per image, all in float32.

A new loss is a function in LOSSES and a Term in `loss_terms`: no other file knows the kinds of terms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from transformers_radio.modeling import AdaptorOutput, RadioModel
from transformers_radio.teachers import TeacherOutput

from .recipe import LossRecipe, Recipe

SUMMARY = "summary"  # the kind of term that compares one vector per image; all others compare features


@dataclass(frozen=True)
class Term:
    """One term of the loss: what the student's head for a teacher is compared by.

    Attributes:
        teacher: its name in the recipe, and its adaptor's in the student.
        kind: a key of LOSSES.
        weight: lambda_i of equation 1 or gamma_i of equation 3; >= 0.
    """

    teacher: str
    kind: str
    weight: float

    def __str__(self) -> str:
        """`teacher/kind`, as metrics.jsonl and messages name it."""
        return f"{self.teacher}/{self.kind}"


def loss_terms(recipe: Recipe, stage_name: str, student: RadioModel) -> list[Term]:
    """The terms of a stage: one for each head that the student has for a teacher of the stage."""
    terms = []
    for name in recipe.stages[stage_name].teacher_names(recipe):
        teacher, head = recipe.teachers[name], student.adaptors[name]
        if head.summary_head is not None:
            terms.append(Term(name, SUMMARY, teacher.summary_weight))
        if head.feature_head is not None:
            terms.append(Term(name, "features", teacher.feature_weight))
    return terms


def summary_loss(head: AdaptorOutput, target: TeacherOutput, config: LossRecipe) -> torch.Tensor | None:
    """Equation 1 for one teacher: the cosine loss of the summaries, float32 (B,); None where the teacher has none."""
    return None if target.summary is None else cosine_loss(head.summary, target.summary)


def feature_loss(head: AdaptorOutput, target: TeacherOutput, config: LossRecipe) -> torch.Tensor:
    """Equation 3 for one teacher: equation 2 on the features, resized to a common grid, float32 (B,)."""
    grid = common_grid(head.grid, target.grid, config.grid)
    return match_loss(
        resize_grid(head.features, head.grid, grid),
        resize_grid(target.features, target.grid, grid),
        config.cosine_weight,
        config.smooth_l1_weight,
        config.smooth_l1_beta,
    )


# Kind -> function of the student's head's output, the teacher's output and the recipe's loss settings, which returns
# each image's loss, float32 (B,), or None where the two have nothing to compare.
LOSSES: dict[str, Callable[[AdaptorOutput, TeacherOutput, LossRecipe], torch.Tensor | None]] = {
    SUMMARY: summary_loss,
    "features": feature_loss,
}


def cosine_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Each image's mean of 1 - cos(prediction, target) along the last dimension (L_cos in equations 1 and 2).

    Args:
        prediction, target: (B, ..., C), any floating dtype.

    Returns:
        float32 (B,) in [0, 2].
    """
    cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1, eps=1e-8)  # (B, ...)
    return 1 - cosine.flatten(1).mean(dim=1) if cosine.ndim > 1 else 1 - cosine


def match_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    smooth_l1_beta: float = 2.0,
) -> torch.Tensor:
    """Equation 2 for each image: cosine for the direction, smooth L1 for the magnitude of the feature vectors.

    Args:
        prediction, target: (B, N, C) features on the same grid, any floating dtype.
        cosine_weight, smooth_l1_weight: the paper's alpha = 0.9 and beta = 0.1.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear. The paper does not give it; 2.0 is what a later
            NVIDIA trainer uses.

    Returns:
        float32 (B,), >= 0.
    """
    smooth_l1 = F.smooth_l1_loss(prediction.float(), target.float(), beta=smooth_l1_beta, reduction="none")
    smooth_l1 = smooth_l1.flatten(1).mean(dim=1)  # (B, N, C) -> (B,)
    return cosine_weight * cosine_loss(prediction, target) + smooth_l1_weight * smooth_l1


def resize_grid(features: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Bilinearly resizes row-major features (B, h*w, C) on `grid` (h, w) to (B, H*W, C) on `size` (H, W), in float32.

    The centers of the outer cells do not move to the image's border (align_corners=False): both grids cover one crop.
    """
    if grid == size:
        return features.float()
    batch, _, channels = features.shape
    maps = features.float().transpose(1, 2).reshape(batch, channels, *grid)  # (B, h*w, C) -> (B, C, h, w)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)


def common_grid(student: tuple[int, int], teacher: tuple[int, int], which: str = "larger") -> tuple[int, int]:
    """The grid (h, w) on which features are compared: the larger of the two (paper section 4, resolution mismatch), or
    the smaller, which is cheaper and asks nothing of the student that the teacher does not resolve."""
    choose = max if which == "larger" else min
    return choose(student[0], teacher[0]), choose(student[1], teacher[1])
