"""What can be wrong with a recipe's values by themselves: no file, teacher or process group is needed to tell."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers_radio.teachers import TEACHERS

if TYPE_CHECKING:
    from .recipe import GroupRecipe, Recipe, StageRecipe

# `RadioConfig.sizes()` and the fields of RadioConfig that a recipe may set: not those that follow from
# student.summary, the teachers and the stages. Written out, as RadioConfig itself takes seconds to load.
STUDENT_SIZES = ("vit-ti-16", "vit-s-16", "vit-b-16", "vit-l-16", "vit-h-16", "vit-so400m-16", "vit-g-16")
STUDENT_CONFIG_FIELDS = (
    *("architectures", "attention_probs_dropout_prob", "chunk_size_feed_forward", "cpe_sampling", "cpe_scale"),
    *("drop_path_rate", "dtype", "final_norm", "hidden_act", "hidden_dropout_prob", "hidden_size", "id2label"),
    *("image_size", "initializer_range", "is_encoder_decoder", "label2id", "layer_norm_eps", "layerscale_value"),
    *("max_img_size", "mlp_norm", "mlp_ratio", "norm_mean", "norm_std", "num_attention_heads", "num_channels"),
    *("num_hidden_layers", "num_registers", "output_hidden_states", "patch_dim", "patch_size", "pos_dropout"),
    *("problem_type", "qkv_bias", "return_dict", "train_window_probability", "train_window_sizes"),
    *("transformers_version", "use_swiglu_ffn", "video_patch_dim", "video_temporal_patch_size"),
    *("window_num_global", "window_num_windowed", "window_prefix", "window_size"),
)


def validate(recipe: "Recipe") -> None:
    """Raises ValueError with the field, its value and what was expected."""
    _require(bool(recipe.teachers), "teachers", recipe.teachers, "at least one teacher")
    _require(bool(recipe.stages), "stages", recipe.stages, "at least one stage")
    # NumPy's generators take 32 bits; the number of the step, or of the process, is added
    _require(0 <= recipe.seed < 2**31, "seed", recipe.seed, "0 or more, and below 2**31")
    _one_of("mixed_precision", recipe.mixed_precision, ("no", "bf16", "fp16", "auto"))
    _validate_student(recipe)
    for name, teacher in recipe.teachers.items():
        where = f"teachers.{name}"
        _require(name.isidentifier(), where, name, "a name of letters, digits and _ (it names the adaptor's weights)")
        _one_of(f"{where}.type", teacher.type, tuple(TEACHERS))
        _one_of(f"{where}.dtype", teacher.dtype, ("float32", "bfloat16", "float16", "auto"))
        _one_of(f"{where}.placement", teacher.placement, ("device", "offloaded", "sharded"))
        for key in ("summary_weight", "feature_weight"):
            _at_least_zero(f"{where}.{key}", getattr(teacher, key))
    if recipe.teacher_cache is not None:
        _require(recipe.data.frozen_crops, "data.frozen_crops", False, "true, as teacher_cache keeps outputs of crops")
        for name, teacher in recipe.teachers.items():  # its processes would have to encode equally many images
            _require(
                teacher.placement != "sharded", f"teachers.{name}.placement", "sharded", "another, with teacher_cache"
            )
    for name, stage in recipe.stages.items():
        _validate_stage(f"stages.{name}", stage, tuple(recipe.teachers))
    for name in recipe.teachers:
        if not any(name in stage.teacher_names(recipe) for stage in recipe.stages.values()):
            raise ValueError(f"teachers.{name} teaches in no stage; remove it, or name it in a stage's teachers")
    _one_of("loss.grid", recipe.loss.grid, ("larger", "smaller"))
    _one_of("loss.balancing", recipe.loss.balancing, ("naive", "uncertainty", "adaloss", "amtml_kd"))
    _one_of("loss.standardization", recipe.loss.standardization, ("none", "phi_s"))
    for key in ("cosine_weight", "smooth_l1_weight", "smooth_l1_beta"):
        _at_least_zero(f"loss.{key}", getattr(recipe.loss, key))
    for key in ("learning_rate", "max_grad_norm", "eps"):
        _require(getattr(recipe.optimizer, key) > 0, f"optimizer.{key}", getattr(recipe.optimizer, key), "> 0")
    _at_least_zero("optimizer.weight_decay", recipe.optimizer.weight_decay)
    for key in ("beta1", "beta2"):
        _require(0 <= getattr(recipe.optimizer, key) < 1, f"optimizer.{key}", getattr(recipe.optimizer, key), "[0, 1)")
    if recipe.ema_decay is not None:
        _require(0 < recipe.ema_decay < 1, "ema_decay", recipe.ema_decay, "null, or between 0 and 1")
    for where, value in (
        ("loss.statistics_images", recipe.loss.statistics_images),
        ("checkpoints.every_steps", recipe.checkpoints.every_steps),
        ("checkpoints.keep", recipe.checkpoints.keep),
        ("log_every_steps", recipe.log_every_steps),
    ):
        _above_zero(where, value)
    _validate_adaptor_names(recipe)  # last: torch takes seconds to load


def _validate_adaptor_names(recipe: "Recipe") -> None:
    from torch import nn

    for name in recipe.teachers:
        _require(
            not hasattr(nn.ModuleDict(), name),
            f"teachers.{name}",
            name,
            "another name: the student keeps its adaptors in an nn.ModuleDict, which has an attribute of this one",
        )


def _validate_student(recipe: "Recipe") -> None:
    student = recipe.student
    _one_of("student.summary", student.summary, ("cls_per_teacher", "cls", "mean"))
    if student.checkpoint is None:
        _one_of("student.size", student.size, STUDENT_SIZES)
        _require(student.keep_adaptors is None, "student.keep_adaptors", student.keep_adaptors, "a student.checkpoint")
    else:  # the checkpoint says this already
        for name in ("summary", "head_hidden_dim"):
            default = next(f.default for f in fields(student) if f.name == name)
            value = getattr(student, name)
            _require(value == default, f"student.{name}", value, "nothing, as student.checkpoint is given")
    for name in student.config:
        _one_of("a field of student.config", name, STUDENT_CONFIG_FIELDS)
    if student.head_hidden_dim is not None:
        _above_zero("student.head_hidden_dim", student.head_hidden_dim)
    _require(0 <= student.weight_noise < 1, "student.weight_noise", student.weight_noise, "0, or a number below 1")
    _one_of("student.attn_implementation", student.attn_implementation, ("sdpa", "eager", "flash_attention_2"))


def _validate_stage(where: str, stage: "StageRecipe", teachers: tuple[str, ...]) -> None:
    _above_zero(f"{where}.steps", stage.steps)
    _require(0 <= stage.warmup_steps < stage.steps, f"{where}.warmup_steps", stage.warmup_steps, "0 <= warmup < steps")
    _require(
        0 <= stage.freeze_trunk_steps < stage.steps,
        f"{where}.freeze_trunk_steps",
        stage.freeze_trunk_steps,
        "0 <= freeze_trunk_steps < steps",
    )
    _one_of(f"{where}.weighting", stage.weighting, ("per_image", "per_rank"))
    if stage.learning_rate is not None:
        _above_zero(f"{where}.learning_rate", stage.learning_rate)
    if stage.weight_decay is not None:
        _at_least_zero(f"{where}.weight_decay", stage.weight_decay)
    if not stage.groups:
        _validate_group(where, stage, teachers)
        return
    for key in ("resolution", "teachers", "micro_batch_size"):
        _require(not getattr(stage, key), f"{where}.{key}", getattr(stage, key), "nothing, as the stage has groups")
    for name, group in stage.groups.items():
        _validate_group(f"{where}.groups.{name}", group, teachers)
        _above_zero(f"{where}.groups.{name}.share", group.share)
        _require(0 < group.rate <= 1, f"{where}.groups.{name}.rate", group.rate, "above 0 and at most 1")
    rates = {name: group.rate for name, group in stage.groups.items()}
    _require(max(rates.values()) == 1, f"{where}.groups", rates, "a rate of 1 for one group at least")


def _validate_group(where: str, group: "GroupRecipe | StageRecipe", teachers: tuple[str, ...]) -> None:
    _above_zero(f"{where}.resolution", group.resolution)
    _above_zero(f"{where}.batch_size", group.batch_size)
    if group.micro_batch_size is not None:
        _above_zero(f"{where}.micro_batch_size", group.micro_batch_size)
    _require(group.teachers != [], f"{where}.teachers", group.teachers, "null for all, or at least one name")
    for name in group.teachers or []:
        _one_of(f"{where}.teachers", name, teachers)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, value, f"one of {', '.join(known)}")


def _above_zero(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, name, value, "a number > 0")


def _at_least_zero(name: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, name, value, "a finite number >= 0")
