"""One distillation step: images -> teachers' targets -> student's heads -> losses (paper section 3.4)."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput, build_teacher

from .losses import cosine_loss, larger_grid, match_loss, resize_grid
from .recipe import LossRecipe, Recipe, TeacherRecipe


def build_teachers(recipe: Recipe, device: torch.device | str = "cpu") -> dict[str, Teacher]:
    """Loads every teacher of the recipe, frozen. A failure names the teacher."""
    teachers = {}
    for name, spec in recipe.teachers.items():
        try:
            teachers[name] = build_teacher(
                spec.type, spec.checkpoint, image_size=spec.image_size, dtype=spec.dtype, **spec.options
            ).to(device)
        except Exception as error:
            raise ValueError(
                f"teachers.{name} ({spec.type}, {spec.checkpoint}) could not be loaded: {error}"
            ) from error
    return teachers


def build_student(recipe: Recipe, teachers: dict[str, Teacher]) -> RadioModel:
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
            "teacher": f"{spec.type}:{spec.checkpoint}",
        }
        for name, spec in recipe.teachers.items()
    }
    try:
        student = _continued(recipe, adaptors) if recipe.student.checkpoint else _fresh(recipe, adaptors)
    except (StrictDataclassError, TypeError) as error:  # a field of student.config has a wrong type
        raise ValueError(f"student.config {recipe.student.config}: {error}") from error
    # What the image processor of the finished student resizes to.
    student.config.preferred_resolution = list(recipe.stages.values())[-1].resolution
    if recipe.student.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    return student


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


def _continued(recipe: Recipe, adaptors: dict[str, dict[str, Any]]) -> RadioModel:
    """The student of a checkpoint with its own heads for the teachers it knows, and new heads for the others."""
    checkpoint = recipe.student.checkpoint
    if not Path(str(checkpoint)).is_dir() and str(checkpoint).count("/") > 1:
        raise ValueError(f"student.checkpoint is {checkpoint!r}; there is no such folder")
    config = RadioConfig.from_pretrained(checkpoint)
    taken = {adaptor["summary_token"] for adaptor in config.adaptors.values() if adaptor["summary_dim"] is not None}
    free = iter([token for token in range(config.num_cls_tokens) if token not in taken])
    for name, adaptor in adaptors.items():
        known = config.adaptors.get(name)
        if known is None:
            adaptor["summary_token"] = 0 if adaptor["summary_dim"] is None else next(free, 0)
            continue
        for width in ("summary_dim", "feature_dim"):
            if adaptor[width] is not None and adaptor[width] != known[width]:
                raise ValueError(
                    f"student.checkpoint {checkpoint} has an adaptor {name!r} with {width} {known[width]}, but "
                    f"teachers.{name} needs {adaptor[width]}; give this teacher another name, or use the one it was "
                    "trained with"
                )
        adaptors[name] = known
    new = [f"adaptors.{name}." for name in adaptors if name not in config.adaptors]
    config = RadioConfig.from_dict({**config.to_dict(), **recipe.student.config, "adaptors": adaptors})
    return RadioModel.from_pretrained(checkpoint, config=config, allow_missing=new)


def teacher_targets(teachers: dict[str, Teacher], images: dict[int, torch.Tensor]) -> dict[str, TeacherOutput]:
    """Runs each teacher on the same crop at its own resolution.

    Args:
        images: side in pixels -> float (B, 3, side, side) in [0, 1].
    """
    with torch.no_grad():
        return {name: teacher(images[teacher.image_size]) for name, teacher in teachers.items()}


def distillation_losses(
    output: Any,
    student_grid: tuple[int, int],
    targets: dict[str, TeacherOutput],
    loss: LossRecipe,
) -> dict[str, torch.Tensor]:
    """The unweighted terms of equations 1 and 3, by `teacher/summary` and `teacher/features`.

    Args:
        output: RadioModelOutput whose adaptors are named as the targets.
        student_grid: (h, w) of the student's features.
        targets: each teacher's summary (B, C) or None, and features (B, h*w, C) with their grid.

    Returns:
        float32 scalars: one for each head that the student has.
    """
    terms = {}
    for name, target in targets.items():
        head = output.adaptors[name]
        if head.summary is not None and target.summary is not None:
            terms[f"{name}/summary"] = cosine_loss(head.summary, target.summary)
        if head.features is not None:
            grid = larger_grid(student_grid, target.grid)
            terms[f"{name}/features"] = match_loss(
                resize_grid(head.features, student_grid, grid),
                resize_grid(target.features, target.grid, grid),
                loss.cosine_weight,
                loss.smooth_l1_weight,
                loss.smooth_l1_beta,
            )
    return terms


def weighted_sum(terms: dict[str, torch.Tensor], teachers: dict[str, TeacherRecipe]) -> torch.Tensor:
    """Equations 1 and 3 summed: lambda_i for summaries, gamma_i for features (naive balancing, section 3.4.1)."""
    total = torch.zeros((), dtype=torch.float32, device=next(iter(terms.values())).device)
    for term, value in terms.items():
        name, kind = term.rsplit("/", 1)
        total = total + getattr(teachers[name], "summary_weight" if kind == "summary" else "feature_weight") * value
    return total


def raise_if_not_finite(terms: dict[str, torch.Tensor], step: int) -> None:
    """One device synchronisation; names the teacher and head of the first term that is NaN or infinite."""
    values = torch.stack(list(terms.values())).detach()
    if bool(values.isfinite().all()):
        return
    bad = [f"{term} = {value.item()}" for term, value in terms.items() if not value.isfinite()]
    raise FloatingPointError(
        f"the loss is not finite at step {step}: {', '.join(bad)} (teacher/head). The last good checkpoint is kept; "
        "lower optimizer.learning_rate, set mixed_precision=bf16 or no, or look at that teacher's outputs"
    )
