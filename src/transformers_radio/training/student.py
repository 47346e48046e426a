"""The student: built from the recipe, and as each stage trains it."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from transformers_radio.data import one_line
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import Teacher, portable_checkpoint
from transformers_radio.training.stability.spectral import add_spectral_reparam
from transformers_radio.training.stability.weight_noise import add_weight_noise

from .continued import continued_student
from .recipe import Recipe, TeacherRecipe


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
    summarized = [name for name in adaptors if adaptors[name]["summary_dim"] is not None]
    num_cls_tokens = 0 if recipe.student.summary == "mean" else 1
    if recipe.student.summary == "cls_per_teacher":
        num_cls_tokens = max(len(summarized), 1)
        for token, name in enumerate(summarized):
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
    """The student as a stage trains it: it shares the weights of `full` and has the heads of the teachers so far.

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
    summarized = {name for name in kept if name in met and full.config.adaptors[name]["summary_dim"] is not None}
    # what its image processor resizes to
    config.preferred_resolution = recipe.stages[stage_name].preferred_resolution(summarized)
    with torch.device("meta"):
        student = RadioModel(config)
    wanted = student.state_dict().keys()
    student.load_state_dict({key: value for key, value in full.state_dict().items() if key in wanted}, assign=True)
    student.set_attn_implementation(recipe.student.attn_implementation)
    for name in resting:
        student.adaptors[name].requires_grad_(False)
    if recipe.student.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    if recipe.student.spectral_reparam:
        add_spectral_reparam(student)
    if recipe.student.weight_noise:
        add_weight_noise(student, recipe.student.weight_noise)
    if recipe.student.compile:
        if recipe.student.spectral_reparam:
            _compile_all(len(student.encoder.layer))
        for layer in student.encoder.layer:
            layer.compile()
    return student


def _compile_all(blocks: int) -> None:
    """Spectral reparametrisation makes a class of each Linear: torch compiles each block for itself then, and leaves
    those beyond its limit as they are."""
    from torch._dynamo import config

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as before torch 2.7
    setattr(config, limit, max(getattr(config, limit), 2 * blocks))
