"""One distillation step: images -> teachers' targets -> student's heads -> losses (paper section 3.4)."""

from typing import Any

import torch
from torch import nn

from transformers_radio.modeling import RadioModel, RadioModelOutput
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training.phi_s.rotation import PhiS

from .balancing import Balancing, build_balancing
from .cache import TeacherCaches, cache_name
from .losses import LOSSES, Term, loss_terms
from .recipe import LossRecipe, Recipe
from .student import stage_student


class Distillation(nn.Module):
    """What the gradients are computed for: the student, and the balancing where it learns."""

    def __init__(self, student: RadioModel, balancing: Balancing, loss_config: LossRecipe):
        super().__init__()
        self.student = student
        self.balancing = balancing
        self.loss_config = loss_config
        self._no_split_modules = student._no_split_modules  # what FSDP2 shards one by one

    def forward(
        self, pixel_values: torch.Tensor, targets: dict[str, TeacherOutput], **options: Any
    ) -> tuple[torch.Tensor, dict[Term, torch.Tensor]]:
        """
        Args:
            pixel_values: (B, 3, H, W) in [0, 1].
            targets: outputs of the teachers of this pass by name; without any, the totals and all gradients are zero.
            options: the student's, from `student.training_options`.

        Returns:
            Each image's balanced total, float32 (B,), and its unweighted loss by term, float32 (B,) each and without
            gradient.
        """
        output = self.student(pixel_values, adaptors=list(targets), **options)
        with torch.autocast(pixel_values.device.type, enabled=False):
            losses = distillation_losses(output, targets, self.balancing.terms, self.loss_config)
            total = self.balancing(losses, output.summary, output.features)
            # Processes may serve different teachers, but have to reduce the gradients of the same weights: those of
            # heads that are not in this pass are zero, and so are those of layers that only the summary or only the
            # features come from, where no teacher of this pass has one.
            absent = [head for name, head in self.student.adaptors.items() if name not in targets]
            idle = [p.sum() for head in absent for p in head.parameters() if p.requires_grad]
            total = total + 0 * sum(idle, output.summary.sum() + output.features.sum())
        return total, {term: loss.detach() for term, loss in losses.items()}


def distillation_losses(
    output: RadioModelOutput, targets: dict[str, TeacherOutput], terms: list[Term], config: LossRecipe
) -> dict[Term, torch.Tensor]:
    """The unweighted losses of the teachers of a pass, float32 (B,) by term.

    Args:
        output: the student's, with an adaptor for each target.
        targets: teacher -> summary (B, C) or None, and features (B, h*w, C) with their grid.
        terms: those of all teachers of the stage.
    """
    losses = {}
    for name, target in targets.items():
        for term in (term for term in terms if term.teacher == name):
            loss = LOSSES[term.kind](output.adaptors[name], target, config)
            if loss is not None:
                losses[term] = loss
    return losses


def build_distillation(recipe: Recipe, stage_name: str, full: RadioModel) -> Distillation:
    """What a stage trains, before it is wrapped. It shares the weights of `full`, the student with all heads."""
    student = stage_student(full, recipe, stage_name)
    terms = loss_terms(recipe, stage_name, student)
    balancing = build_balancing(recipe.loss.balancing, terms, student.summary_dim, student.feature_dim)
    return Distillation(student, balancing, recipe.loss)


@torch.no_grad()
def teacher_targets(
    teachers: dict[str, Teacher],
    images: dict[int, torch.Tensor],
    transforms: dict[str, PhiS] | None = None,
    keys: list[str] | None = None,
    caches: TeacherCaches | None = None,
) -> dict[str, TeacherOutput]:
    """Runs each teacher on the same crop at its own resolution.

    Args:
        images: side in pixels -> float (B, 3, side, side) in [0, 1].
        transforms: teacher -> PHI-S of its features, for the teachers whose features are standardized.
        keys: names of the B images, needed with `caches`.
        caches: outputs of these teachers by `cache_name`.
    """
    if caches is None:
        targets = {name: teacher(images[teacher.image_size]) for name, teacher in teachers.items()}
    else:
        targets = {
            name: caches[cache_name(name, images)].targets(keys or [], images[teacher.image_size], teacher)
            for name, teacher in teachers.items()
        }
    for name, transform in (transforms or {}).items():
        if name in targets:
            targets[name].features = transform.standardize(targets[name].features)
    return targets
