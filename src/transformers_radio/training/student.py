"""The student: built from the recipe, and as each stage trains it."""

import difflib
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from transformers_radio.data import one_line
from transformers_radio.modeling import RadioModel, student_class
from transformers_radio.teachers import Teacher, portable_checkpoint
from transformers_radio.training.stability.batch_norm import replace_batch_norms
from transformers_radio.training.stability.spectral import add_spectral_reparam

from .recipe import Recipe, StudentRecipe, TeacherRecipe

logger = logging.getLogger(__name__)

# What these fields of a recipe's student do, they do to its blocks.
ON_BLOCKS = ("compile", "gradient_checkpointing", "spectral_reparam")


@dataclass(frozen=True)
class TeacherShape:
    """What a student has to know of a teacher, also where another process serves that teacher."""

    summary_dim: int | None
    feature_dim: int
    image_size: int
    patch_size: int
    weights: str = ""  # a hash, where the student's config is to name it

    @classmethod
    def of(cls, teacher: Teacher) -> "TeacherShape":
        return cls(teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size)


def build_student(recipe: Recipe, teachers: dict[str, TeacherShape]) -> RadioModel:
    """The student with one adaptor per teacher (paper section 3.2), of its size or from its checkpoint.

    Heads exist for the terms that are trained: a summary head where the teacher has a summary and summary_weight > 0,
    a feature head where feature_weight > 0.

    Raises:
        ValueError: fields of `student` that do not fit together, the type of student, its checkpoint or the teachers.
    """
    options, adaptors = recipe.student, _adaptors(recipe, teachers)
    model_class = student_class(options.type)
    known = sorted(field.name for field in fields(model_class.config_class))
    for name in options.config:
        if name not in known:  # the configuration would keep it as an attribute that nothing reads
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"student.config.{name} is not a field of {model_class.config_class.__name__}; {hint}")
    try:
        if options.checkpoint is not None:
            student = _from_checkpoint(recipe, adaptors)
        else:
            summary = {} if options.summary is None else {"summary": options.summary}
            config = model_class.config_class.for_training(options.size, adaptors, **summary, **options.config)
            student = model_class(config)
    except (StrictDataclassError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"gives no student of type {options.type} ({type(error).__name__}: {one_line(error)})"
        if options.config:  # a field of a wrong type, or a value that layers cannot have
            raise ValueError(
                f"student.config {options.config} {reason}; correct the field, or leave it out"
            ) from error
        if options.checkpoint is not None:
            raise
        raise ValueError(f"student.size {options.size!r} {reason}; name a size of this type") from error
    if options.attn_implementation != "sdpa" and not student._supports_sdpa:
        raise ValueError(
            f"student.attn_implementation is {options.attn_implementation}, but students of the type {options.type} "
            "have no attention to choose; leave it out"
        )
    linears = [part for block in student.blocks for part in block.modules() if isinstance(part, nn.Linear)]
    if options.spectral_reparam and student.blocks and not linears:
        raise ValueError(
            "student.spectral_reparam acts on the Linears in a student's blocks, and this student has none there; "
            "leave it out"
        )
    without_effect = [name for name in ON_BLOCKS if getattr(options, name) and not student.blocks]
    if without_effect:
        raise ValueError(
            f"student.{without_effect[0]} acts on a student's blocks, and students of the type {options.type} name "
            "none; leave it out"
        )
    return student


def _adaptors(recipe: Recipe, teachers: dict[str, TeacherShape]) -> dict[str, dict[str, Any]]:
    """Entries of the student's `config.adaptors` for the recipe's teachers."""
    widest = max(max(teacher.feature_dim, teacher.summary_dim or 0) for teacher in teachers.values())
    adaptors = {}
    for name, spec in recipe.teachers.items():
        teacher = teachers[name]
        adaptors[name] = {
            "summary_dim": teacher.summary_dim if spec.summary_weight > 0 else None,
            "feature_dim": teacher.feature_dim if spec.feature_weight > 0 else None,
            "hidden_dim": recipe.student.head_hidden_dim or widest,
            "teacher": _teacher_name(spec),
            "teacher_weights": teacher.weights,
        }
        if adaptors[name]["summary_dim"] is None and adaptors[name]["feature_dim"] is None:
            raise ValueError(
                f"teachers.{name} teaches nothing: feature_weight is 0 and it has no summary, or summary_weight is 0; "
                "raise a weight or remove the teacher"
            )
    return adaptors


def _teacher_name(spec: TeacherRecipe) -> str:
    """TYPE:CHECKPOINT as a published student may name it: without the folders of this machine."""
    if spec.type == "python":
        return f"python:{spec.options.get('target') or spec.checkpoint}"
    return f"{spec.type}:{portable_checkpoint(spec.checkpoint)}"


def _from_checkpoint(recipe: Recipe, adaptors: dict[str, dict[str, Any]]) -> RadioModel:
    """The student of `student.checkpoint` with heads for the recipe's teachers.

    Its heads for teachers that it knows stay, and so do those for other teachers (see `student.keep_adaptors`). New
    teachers get new heads.

    Raises:
        ValueError: there is no such checkpoint; it knows a teacher of this name with other widths.
    """
    saved = _load(recipe.student)
    own = saved.config.adaptors
    for name in adaptors.keys() & own.keys():
        for width in ("summary_dim", "feature_dim"):
            if adaptors[name][width] not in (None, own[name][width]):
                raise ValueError(
                    f"student.checkpoint {recipe.student.checkpoint} has an adaptor {name!r} with {width} "
                    f"{own[name][width]}, but teachers.{name} needs {adaptors[name][width]}; give this teacher "
                    "another name, or use the one it was trained with"
                )
    kept = _kept_adaptors(recipe, list(own))
    grown = saved.with_new_adaptors({name: adaptor for name, adaptor in adaptors.items() if name not in own})
    student = grown.with_adaptors([*kept, *adaptors])
    for name, adaptor in adaptors.items():
        student.config.adaptors[name] |= {key: adaptor[key] for key in ("teacher", "teacher_weights")}
    return student


def _load(options: StudentRecipe) -> RadioModel:
    """The saved student in float32, with `student.config` over its own configuration."""
    checkpoint, model_class = str(options.checkpoint), student_class(options.type)
    if not Path(checkpoint).is_dir() and checkpoint.count("/") > 1:
        raise ValueError(f"student.checkpoint is {checkpoint!r}; there is no such folder")
    found = model_class.config_class.get_config_dict(checkpoint)[0].get("model_type")
    if found != options.type:
        raise ValueError(
            f"student.checkpoint {checkpoint} holds a model of the type {found}, and student.type is {options.type}; "
            f"set student.type={found}, or choose another checkpoint"
        )
    config = model_class.config_class.from_pretrained(checkpoint)
    config = type(config).from_dict({**config.to_dict(), **options.config})
    try:
        return model_class.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    except ValueError as error:
        if "other shapes" not in str(error):
            raise
        raise ValueError(
            f"the weights of student.checkpoint {checkpoint} do not have the shapes that student.config "
            f"{options.config} gives them; leave out the fields that change shapes"
        ) from error


def _kept_adaptors(recipe: Recipe, adaptors: list[str]) -> list[str]:
    """Those of the checkpoint's adaptors that no teacher of the recipe trains and that are not left out."""
    others = [name for name in adaptors if name not in recipe.teachers]
    keep = recipe.student.keep_adaptors
    for name in keep or []:
        if name not in others:
            raise ValueError(
                f"student.keep_adaptors names {name!r}; student.checkpoint {recipe.student.checkpoint} has, beside "
                f"the recipe's teachers, the adaptors {', '.join(others) or '(none)'}"
            )
    kept = [name for name in others if keep is None or name in keep]
    if not dist.is_initialized() or dist.get_rank() == 0:  # every process builds the student
        for name in others:
            what = "kept as it is, frozen" if name in kept else "left out, as student.keep_adaptors says"
            logger.warning(f"the student's adaptor {name!r} has no teacher in this recipe: it is {what}")
    return kept


def stage_student(full: RadioModel, recipe: Recipe, stage_name: str) -> RadioModel:
    """The student as a stage trains it: it shares the weights of `full` and has the heads of the teachers so far.

    Heads of teachers absent from this stage are kept, frozen; so are those that a checkpoint brought and that no
    teacher of the recipe trains.
    """
    options, stage = recipe.student, recipe.stages[stage_name]
    met: list[str] = []
    for name, one in recipe.stages.items():
        met += one.teacher_names(recipe)
        if name == stage_name:
            break
    student = full.with_adaptors([name for name in full.adaptors if name in met or name not in recipe.teachers])
    for name in student.adaptors.keys() - set(stage.teacher_names(recipe)):
        student.adaptors[name].requires_grad_(False)
    summarized = {name for name in student.adaptors if name in met and full.adaptors[name].summary_head is not None}
    # what its image processor resizes to
    student.config.preferred_resolution = stage.preferred_resolution(summarized)
    if student._supports_sdpa:  # a student without attention has no implementation to choose
        student.set_attn_implementation(options.attn_implementation)
    replace_batch_norms(student, stage.batch_norm)
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    if options.spectral_reparam:
        add_spectral_reparam(student)
    if options.compile:
        if options.spectral_reparam:
            _compile_all(len(student.blocks))
        for block in student.blocks:
            block.compile()
    return student


def _compile_all(blocks: int) -> None:
    """Raises torch's limit of compiled functions: the blocks beyond it would stay as they are.

    Spectral reparametrization makes a class of each Linear, so that torch compiles each block for itself.
    """
    from torch._dynamo import config

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as before torch 2.7
    setattr(config, limit, max(getattr(config, limit), 2 * blocks))
