"""One distillation step: images -> teachers' targets -> student's heads -> losses (paper section 3.4)."""

from typing import Any

import torch
from torch import nn

from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training.phi_s.rotation import PhiS

from .balancing import build_balancing
from .cache import TeacherCaches, cache_name
from .losses import common_grid, cosine_loss, match_loss, resize_grid
from .recipe import LossRecipe, Recipe
from .student import stage_student


class Distillation(nn.Module):
    """What the gradients are of: the student, and the balancing where it learns."""

    def __init__(self, student: RadioModel, balancing: nn.Module, loss: LossRecipe):
        super().__init__()
        self.student = student
        self.balancing = balancing
        self.loss = loss

    def forward(
        self, pixel_values: torch.Tensor, targets: dict[str, TeacherOutput], window_size: int | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            pixel_values: (B, 3, H, W) in [0, 1].
            targets: of the teachers of this pass; with none the totals are 0 and every gradient is zero.
            window_size: as in RadioModel.forward.

        Returns:
            Each image's balanced total, float32 (B,), and its terms by `teacher/summary` and `teacher/features`,
            float32 (B,) each and without gradient.
        """
        output = self.student(pixel_values, adaptors=list(targets), window_size=window_size)
        height, width = pixel_values.shape[-2:]
        grid = (height // self.student.patch_size, width // self.student.patch_size)
        with torch.autocast(pixel_values.device.type, enabled=False):
            terms = distillation_losses(output, grid, targets, self.loss)
            total = self.balancing(terms, output.summary, output.features)
            # Processes may serve different teachers, but have to reduce the gradients of the same weights: those of
            # heads that are not in this pass are zero.
            idle = [p.sum() for name, head in self.student.adaptors.items() if name not in targets
                    for p in head.parameters() if p.requires_grad]  # fmt: skip
            idle += [] if targets else [output.summary.sum(), output.features.sum()]
            total = total + 0 * sum(idle) if idle else total
        return total, {name: term.detach() for name, term in terms.items()}


def build_distillation(recipe: Recipe, stage_name: str, full_student: RadioModel) -> Distillation:
    """What a stage trains, before it is wrapped. It shares the weights of `full_student`."""
    student = stage_student(full_student, recipe, stage_name)
    taught = recipe.stages[stage_name].teacher_names(recipe)
    weights = {term: w for term, w in term_weights(recipe, student).items() if term.split("/")[0] in taught}
    config = student.config
    summary_dim = config.hidden_size * (len(config.summary_idxs) if config.summary_type == "cls" else 1)
    balancing = build_balancing(recipe.loss.balancing, weights, summary_dim, config.hidden_size)
    return Distillation(student, balancing, recipe.loss)


def term_weights(recipe: Recipe, student: RadioModel) -> dict[str, float]:
    """lambda_i of equation 1 and gamma_i of equation 3 for every head that the student has."""
    weights = {}
    for name, spec in recipe.teachers.items():
        if name in student.adaptors and student.adaptors[name].summary_head is not None:
            weights[f"{name}/summary"] = spec.summary_weight
        if name in student.adaptors and student.adaptors[name].feature_head is not None:
            weights[f"{name}/features"] = spec.feature_weight
    return weights


@torch.no_grad()
def teacher_targets(
    teachers: dict[str, Teacher],
    images: dict[int, torch.Tensor],
    standardize: dict[str, PhiS] | None = None,
    keys: list[str] | None = None,
    caches: TeacherCaches | None = None,
) -> dict[str, TeacherOutput]:
    """Runs each teacher on the same crop at its own resolution.

    Args:
        images: side in pixels -> float (B, 3, side, side) in [0, 1].
        standardize: of the features of these teachers.
        keys: names of the B images, needed with `caches`.
        caches: of these teachers' outputs for these images, by `cache_name`.
    """
    if caches is None:
        targets = {name: teacher(images[teacher.image_size]) for name, teacher in teachers.items()}
    else:
        targets = {
            name: caches[cache_name(name, images)].targets(keys or [], images[teacher.image_size], teacher)
            for name, teacher in teachers.items()
        }
    for name, transform in (standardize or {}).items():
        if name in targets:
            targets[name].features = transform.standardise(targets[name].features)
    return targets


def distillation_losses(
    output: Any, student_grid: tuple[int, int], targets: dict[str, TeacherOutput], loss: LossRecipe
) -> dict[str, torch.Tensor]:
    """The unweighted terms of equations 1 and 3, by `teacher/summary` and `teacher/features`.

    Args:
        output: RadioModelOutput whose adaptors are named as the targets.
        student_grid: (h, w) of the student's features.
        targets: each teacher's summary (B, C) or None, and features (B, h*w, C) with their grid.

    Returns:
        float32 (B,): one value an image, for each head that the student has.
    """
    terms = {}
    for name, target in targets.items():
        head = output.adaptors[name]
        if head.summary is not None and target.summary is not None:
            terms[f"{name}/summary"] = cosine_loss(head.summary, target.summary)
        if head.features is not None:
            grid = common_grid(student_grid, target.grid, loss.grid)
            terms[f"{name}/features"] = match_loss(
                resize_grid(head.features, student_grid, grid),
                resize_grid(target.features, target.grid, grid),
                loss.cosine_weight,
                loss.smooth_l1_weight,
                loss.smooth_l1_beta,
            )
    return terms
