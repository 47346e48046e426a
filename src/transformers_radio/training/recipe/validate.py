"""Checks of a recipe's values by themselves, for which no file, teacher or process group is needed."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from transformers_radio.data import DataConfig
from transformers_radio.modeling import STUDENTS

from .fields import GroupRecipe, Recipe, StageRecipe

# `RadioConfig.sizes()` and the fields of RadioConfig that a recipe may set: not those that follow from
# student.summary, the teachers and the stages. Written out, as RadioConfig itself takes seconds to load.
STUDENT_SIZES = ("vit-ti-16", "vit-s-16", "vit-b-16", "vit-l-16", "vit-h-16", "vit-so400m-16", "vit-g-16")
STUDENT_CONFIG_FIELDS = (
    *("architectures", "attention_probs_dropout_prob", "chunk_size_feed_forward", "cpe_sampling", "cpe_scale"),
    *("drop_path_rate", "dtype", "final_norm", "hidden_act", "hidden_dropout_prob", "hidden_size", "id2label"),
    *("image_size", "initializer_range", "is_encoder_decoder", "label2id", "layer_norm_eps", "layerscale_value"),
    *("max_img_size", "mlp_norm", "mlp_ratio", "norm_mean", "norm_std", "num_attention_heads", "num_channels"),
    *("num_hidden_layers", "num_registers", "output_hidden_states", "patch_bias", "patch_dim", "patch_size"),
    *("pos_dropout", "problem_type", "qkv_bias", "train_window_probability", "train_window_sizes"),
    *("transformers_version", "use_swiglu_ffn", "video_patch_dim", "video_temporal_patch_size"),
    *("window_num_global", "window_num_windowed", "window_prefix", "window_size"),
)


def validate(recipe: Recipe) -> None:
    """Raises ValueError with the field, its value and what was expected."""
    _require(bool(recipe.teachers), "teachers", recipe.teachers, "at least one teacher")
    _require(bool(recipe.stages), "stages", recipe.stages, "at least one stage")
    _validate_fields(recipe, "")
    _require(bool(recipe.output_dir), "output_dir", recipe.output_dir, "the folder of the run")
    _validate_student(recipe)
    for name in recipe.teachers:
        expected = "a name of letters, digits and _ (it names the adaptor's weights)"
        _require(name.isidentifier(), f"teachers.{name}", name, expected)
    if recipe.teacher_cache is not None:
        _require(recipe.data.frozen_crops, "data.frozen_crops", False, "true, as teacher_cache keeps outputs of crops")
        for name, teacher in recipe.teachers.items():  # its processes would have to encode equally many images
            _require(
                teacher.placement != "sharded", f"teachers.{name}.placement", "sharded", "another, with teacher_cache"
            )
    for name, stage in recipe.stages.items():
        _require(bool(name), "stages", list(recipe.stages), "a name for each stage")
        _validate_stage(f"stages.{name}", stage, tuple(recipe.teachers))
    steps = sum(stage.steps for stage in recipe.stages.values())
    _require(steps < 10**8, "the sum of stages.NAME.steps", steps, "less than 100000000")
    for name in recipe.teachers:
        if not any(name in stage.teacher_names(recipe) for stage in recipe.stages.values()):
            raise ValueError(f"teachers.{name} teaches in no stage; remove it, or name it in a stage's teachers")
    recipe.data.validate()
    _validate_adaptor_names(recipe)  # last: torch takes seconds to load


def _validate_fields(section: Any, where: str) -> None:
    """Checks a section, and the sections within it, against the ranges and choices in its fields' metadata."""
    types = get_type_hints(type(section))
    for field in fields(section):
        value, name = getattr(section, field.name), f"{where}{field.name}"
        if isinstance(value, DataConfig):  # which validates itself
            continue
        if is_dataclass(value):
            _validate_fields(value, f"{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if is_dataclass(item):
                    _validate_fields(item, f"{name}.{key}.")
        elif value is None and type(None) in get_args(types[field.name]):
            continue
        elif "choices" in field.metadata:
            _one_of(name, value, field.metadata["choices"])
        elif "range" in field.metadata:
            whole = types[field.name] in (int, int | None)
            expected = f"{'a whole number' if whole else 'a number'} in {field.metadata['range']}"
            _require(_lies_in(value, field.metadata["range"], whole), name, value, expected)


def _lies_in(value: Any, interval: str, whole: bool) -> bool:
    """Whether a number lies in an interval such as "(0, 1]", which is above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


def _validate_adaptor_names(recipe: Recipe) -> None:
    from torch import nn

    for name in recipe.teachers:
        _require(
            not hasattr(nn.ModuleDict(), name),
            f"teachers.{name}",
            name,
            "another name: the student keeps its adaptors in an nn.ModuleDict, which has an attribute of this one",
        )


def _validate_student(recipe: Recipe) -> None:
    student = recipe.student
    _one_of("student.type", student.type, tuple(STUDENTS))
    if student.checkpoint is None:
        _require(student.keep_adaptors is None, "student.keep_adaptors", student.keep_adaptors, "a student.checkpoint")
    else:  # the checkpoint says this already
        for name in ("summary", "head_hidden_dim"):
            default = next(f.default for f in fields(student) if f.name == name)
            value = getattr(student, name)
            # cls_per_teacher: the default that earlier recipes have written out
            wrong = value not in (default, "cls_per_teacher")
            _require(not wrong, f"student.{name}", value, "none: remove it, as student.checkpoint has its own")
    if student.type == "radio":  # other configurations are asked when the student is built
        if student.checkpoint is None:
            _one_of("student.size", student.size, STUDENT_SIZES)
        for name in student.config:
            _one_of("a field of student.config", name, STUDENT_CONFIG_FIELDS)


def _validate_stage(where: str, stage: StageRecipe, teachers: tuple[str, ...]) -> None:
    expected = f"fewer than {where}.steps, which is {stage.steps}"
    _require(stage.warmup_steps < stage.steps, f"{where}.warmup_steps", stage.warmup_steps, expected)
    if not stage.groups:
        _require(stage.resolution > 0, f"{where}.resolution", stage.resolution, "the student's input side in pixels")
        _validate_group(where, stage, teachers)
        return
    for key in ("resolution", "teachers", "micro_batch_size"):
        _require(not getattr(stage, key), f"{where}.{key}", getattr(stage, key), "nothing, as the stage has groups")
    for name, group in stage.groups.items():
        _require(bool(name), f"{where}.groups", list(stage.groups), "a name for each group")
        _validate_group(f"{where}.groups.{name}", group, teachers)
    rates = {name: group.rate for name, group in stage.groups.items()}
    _require(max(rates.values()) == 1, f"{where}.groups", rates, "a rate of 1 for at least one group")


def _validate_group(where: str, group: GroupRecipe | StageRecipe, teachers: tuple[str, ...]) -> None:
    _require(group.teachers != [], f"{where}.teachers", group.teachers, "null for all, or at least one name")
    for name in group.teachers or []:
        _one_of(f"{where}.teachers", name, teachers)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, value, f"one of {', '.join(known)}")
