"""One distillation step: images -> teachers' targets -> student's heads -> losses (paper section 3.4)."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from transformers_radio.data import one_line
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput, portable_checkpoint
from transformers_radio.training.phi_s.rotation import PhiS
from transformers_radio.training.stability.spectral import add_spectral_reparam
from transformers_radio.training.stability.weight_noise import add_weight_noise

from .balancing import build_balancing
from .cache import TeacherCaches, cache_name
from .continued import continued_student
from .losses import common_grid, cosine_loss, match_loss, resize_grid
from .recipe import LossRecipe, Recipe, TeacherRecipe


@dataclass(frozen=True)
class TeacherShape:
    """What a student has to know of a teacher: of all teachers, also those that another process serves."""

    summary_dim: int | None
    feature_dim: int
    image_size: int
    patch_size: int
    weights: str = ""  # a hash, where the student's config is to name it

    @classmethod
    def of(cls, teacher: Teacher) -> "TeacherShape":
        return cls(teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size)


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


def build_student(recipe: Recipe, teachers: dict[str, TeacherShape]) -> RadioModel:
    """The student with one adaptor a teacher (paper section 3.2), of its size or from its checkpoint.

    Heads exist for the terms that are trained: a summary head where the teacher has a summary and summary_weight > 0,
    a feature head where feature_weight > 0.
    """
    has_summary = {
        name: teachers[name].summary_dim is not None and spec.summary_weight > 0
        for name, spec in recipe.teachers.items()
    }
    has_features = {name: spec.feature_weight > 0 for name, spec in recipe.teachers.items()}
    for name in recipe.teachers:
        if not has_summary[name] and not has_features[name]:
            raise ValueError(
                f"teachers.{name} teaches nothing: feature_weight is 0 and it has no summary, or summary_weight is 0; "
                "raise a weight or remove the teacher"
            )
    widest = max(max(teacher.feature_dim, teacher.summary_dim or 0) for teacher in teachers.values())
    adaptors: dict[str, dict[str, Any]] = {
        name: {
            "summary_dim": teachers[name].summary_dim if has_summary[name] else None,
            "feature_dim": teachers[name].feature_dim if has_features[name] else None,
            "hidden_dim": recipe.student.head_hidden_dim or widest,
            "summary_token": 0,
            "teacher": _teacher_name(spec),
            "teacher_weights": teachers[name].weights,
        }
        for name, spec in recipe.teachers.items()
    }
    try:
        student = continued_student(recipe, adaptors) if recipe.student.checkpoint else _fresh(recipe, adaptors)
    except (StrictDataclassError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if not recipe.student.config:
            raise
        # a field of a wrong type, or a value that layers cannot have
        raise ValueError(
            f"student.config {recipe.student.config} gives no student ({type(error).__name__}: {one_line(error)}); "
            "correct the field, or leave it out for the size's own value"
        ) from error
    return student


def _teacher_name(spec: TeacherRecipe) -> str:
    """TYPE:CHECKPOINT as a published student may name it: without the folders of this machine."""
    if spec.type == "python":
        return f"python:{spec.options.get('target') or spec.checkpoint}"
    return f"{spec.type}:{portable_checkpoint(spec.checkpoint)}"


def _fresh(recipe: Recipe, adaptors: dict[str, dict[str, Any]]) -> RadioModel:
    """A student with random weights and one CLS token a summary head, one for all, or none (average pooling)."""
    summarised = [name for name in adaptors if adaptors[name]["summary_dim"] is not None]
    num_cls_tokens = 0 if recipe.student.summary == "mean" else 1
    if recipe.student.summary == "cls_per_teacher":
        num_cls_tokens = max(len(summarised), 1)
        for token, name in enumerate(summarised):
            adaptors[name]["summary_token"] = token
    config = RadioConfig.from_size(
        recipe.student.size,
        adaptors=adaptors,
        summary_type="mean" if recipe.student.summary == "mean" else "cls",
        num_cls_tokens=num_cls_tokens,
        summary_idxs=list(range(num_cls_tokens)),
        **recipe.student.config,
    )
    return RadioModel(config)


def stage_student(full: RadioModel, recipe: Recipe, stage_name: str) -> RadioModel:
    """The student of a stage: of `full`, with the heads of the teachers up to this stage.

    Heads of teachers that came and went stay, and rest; so do those that a checkpoint brought and nobody teaches.
    """
    met: list[str] = []
    for name, stage in recipe.stages.items():
        met += stage.teacher_names(recipe)
        if name == stage_name:
            break
    kept = [name for name in full.adaptors if name in met or name not in recipe.teachers]
    resting = set(kept) - set(recipe.stages[stage_name].teacher_names(recipe))
    config = RadioConfig.from_dict(
        {**full.config.to_dict(), "adaptors": {name: full.config.adaptors[name] for name in kept}}
    )
    summarised = {name for name in kept if name in met and full.config.adaptors[name]["summary_dim"] is not None}
    # what its image processor resizes to
    config.preferred_resolution = recipe.stages[stage_name].preferred_resolution(summarised)
    with torch.device("meta"):
        student = RadioModel(config)
    wanted = student.state_dict().keys()
    student.load_state_dict({key: value for key, value in full.state_dict().items() if key in wanted}, assign=True)
    student.set_attn_implementation(recipe.student.attn_implementation)
    for name in resting:
        student.adaptors[name].requires_grad_(False)
    if recipe.student.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    return student


def build_distillation(recipe: Recipe, stage_name: str, full_student: RadioModel) -> Distillation:
    """What a stage trains, before it is wrapped. It shares the weights of `full_student`."""
    student = stage_student(full_student, recipe, stage_name)
    if recipe.student.spectral_reparam:
        add_spectral_reparam(student)
    if recipe.student.weight_noise:
        add_weight_noise(student, recipe.student.weight_noise)
    if recipe.student.compile:
        if recipe.student.spectral_reparam:
            _compile_all(len(student.encoder.layer))
        for layer in student.encoder.layer:
            layer.compile()
    taught = recipe.stages[stage_name].teacher_names(recipe)
    weights = {term: w for term, w in term_weights(recipe, student).items() if term.split("/")[0] in taught}
    config = student.config
    summary_dim = config.hidden_size * (len(config.summary_idxs) if config.summary_type == "cls" else 1)
    balancing = build_balancing(recipe.loss.balancing, weights, summary_dim, config.hidden_size)
    return Distillation(student, balancing, recipe.loss)


def _compile_all(blocks: int) -> None:
    """Spectral reparametrisation makes a class of each Linear: torch compiles each block for itself then, and leaves
    those beyond its limit as they are."""
    from torch._dynamo import config

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as before torch 2.7
    setattr(config, limit, max(getattr(config, limit), 2 * blocks))


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
