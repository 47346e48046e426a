"""A recipe is one YAML file over these dataclasses; every field can be overridden as `key=value`."""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transformers_radio.data import DataConfig
from transformers_radio.modeling import RadioConfig


@dataclass
class StudentRecipe:
    """The student encoder. `checkpoint` starts from a saved student, otherwise it is built from `size`."""

    size: str = "vit-b-16"  # a name from RadioConfig.sizes()
    config: dict[str, Any] = field(
        default_factory=dict
    )  # fields of RadioConfig that differ from the size's (checkpoint's)
    checkpoint: str | None = None  # a student's folder or Hub id, in place of `size`
    summary: str = "cls_per_teacher"  # cls_per_teacher | cls | mean (paper Table 5)
    head_hidden_dim: int | None = None  # null: the widest teacher (paper section 3.2)
    gradient_checkpointing: bool = False


@dataclass
class TeacherRecipe:
    """One frozen teacher. Its name in the recipe is the name of the student's adaptor."""

    type: str = MISSING  # open_clip | transformers | segment_anything | timm | python
    checkpoint: str = MISSING  # Hub id, local path, or module:Class
    image_size: int | None = None  # pixels; null: the teacher's own
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)  # of this type, e.g. features: neck for SAM
    summary_weight: float = 1.0  # lambda_i of equation 1; a teacher without a summary (SAM) has no such term
    feature_weight: float = 1.0  # gamma_i of equation 3


@dataclass
class LossRecipe:
    """Equation 2. The smooth L1 turning point is not in the paper; 2.0 is a later NVIDIA trainer's."""

    cosine_weight: float = 0.9
    smooth_l1_weight: float = 0.1
    smooth_l1_beta: float = 2.0


@dataclass
class OptimizerRecipe:
    """AdamW, base learning rate 1e-3 (paper section 4). The paper gives no betas, eps or clipping: these are ours."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class StageRecipe:
    """A stretch of training at one student resolution, with its own warm-up and cosine schedule."""

    steps: int = MISSING  # optimizer steps
    resolution: int = MISSING  # student input side in pixels
    batch_size: int = 1024  # images an optimizer step, over all processes
    micro_batch_size: int | None = None  # images a forward pass and process; null: batch_size / processes
    warmup_steps: int = 0
    teachers: list[str] | None = None  # null: all


@dataclass
class CheckpointRecipe:
    every_steps: int = 1000
    keep: int = 2


@dataclass
class Recipe:
    """The whole run. Mind that `output_dir` is continued when it holds an unfinished run of the same recipe."""

    output_dir: str = MISSING
    teachers: dict[str, TeacherRecipe] = MISSING
    stages: dict[str, StageRecipe] = MISSING  # run in the order written
    data: DataConfig = MISSING
    student: StudentRecipe = field(default_factory=StudentRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    mixed_precision: str = "no"  # no | bf16 | fp16
    seed: int = 0
    log_every_steps: int = 10
    tracker: str | None = "tensorboard"  # any tracker of Accelerate; null: metrics.jsonl alone
    overwrite: bool = False  # true: a finished run, or one of another recipe, in output_dir is deleted


# `${package:quickstart/teachers/clip}` is a path inside the installed package.
OmegaConf.register_resolver(
    "package", lambda path: str(resources.files("transformers_radio").joinpath(path)), replace=True
)


# Fields of RadioConfig that a recipe may set: not those that follow from student.summary, the teachers and the stages.
STUDENT_CONFIG_FIELDS = tuple(
    sorted(
        {f.name for f in fields(RadioConfig)}
        - {"adaptors", "summary_type", "num_cls_tokens", "summary_idxs", "preferred_resolution"}
    )
)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe, applies `key=value` overrides (`teachers.sam.summary_weight=0`) and validates the result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown field (with the nearest known one), a wrong type, a missing value, or values that do
            not fit together. The message names the field, the value and what was expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no recipe at {path}; recipes are YAML files, see the folder recipes/")
    overrides = list(overrides or [])
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value, e.g. stages.main.steps=100")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} is not a mapping of recipe fields")
    written = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
    assert isinstance(written, DictConfig)
    _check_names(written, Recipe, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), written)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"recipe {path} leaves {', '.join(missing)} unset")
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"recipe {path}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    assert isinstance(recipe, Recipe)
    validate(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)), encoding="utf-8")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _check_names(written: Any, schema: Any, prefix: str) -> None:
    """OmegaConf rejects unknown fields, but does not say which field was probably meant."""
    if is_dataclass(schema):
        known = get_type_hints(schema)
        for key, value in written.items_ex(resolve=False) if isinstance(written, DictConfig) else ():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown recipe field {prefix}{key!s}; {hint}")
            _check_names(value, known[key], f"{prefix}{key!s}.")
    elif isinstance(written, DictConfig) and get_args(schema) and is_dataclass(get_args(schema)[-1]):
        for key, value in written.items_ex(resolve=False):
            _check_names(value, get_args(schema)[-1], f"{prefix}{key!s}.")


def validate(recipe: Recipe) -> None:
    """Checks the values that need no file and no process group."""
    _require(bool(recipe.teachers), "teachers", recipe.teachers, "at least one teacher")
    _require(bool(recipe.stages), "stages", recipe.stages, "at least one stage")
    _one_of("mixed_precision", recipe.mixed_precision, ("no", "bf16", "fp16"))
    _one_of("student.summary", recipe.student.summary, ("cls_per_teacher", "cls", "mean"))
    if recipe.student.checkpoint is None:
        _one_of("student.size", recipe.student.size, tuple(RadioConfig.sizes()))
    else:  # the checkpoint says this already
        for name in ("summary", "head_hidden_dim"):
            value, default = getattr(recipe.student, name), getattr(StudentRecipe(), name)
            _require(value == default, f"student.{name}", value, "nothing, as student.checkpoint is given")
    for name in recipe.student.config:
        _one_of("a field of student.config", name, STUDENT_CONFIG_FIELDS)
    for name, teacher in recipe.teachers.items():
        where = f"teachers.{name}"
        _require(name.isidentifier(), where, name, "a name of letters, digits and _ (it names the adaptor's weights)")
        _one_of(f"{where}.dtype", teacher.dtype, ("float32", "bfloat16", "float16"))
        for weight in ("summary_weight", "feature_weight"):
            value = getattr(teacher, weight)
            _require(math.isfinite(value) and value >= 0, f"{where}.{weight}", value, "a finite number >= 0")
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        for key in ("steps", "resolution", "batch_size"):
            _require(getattr(stage, key) > 0, f"{where}.{key}", getattr(stage, key), "a whole number > 0")
        _require(
            0 <= stage.warmup_steps < stage.steps, f"{where}.warmup_steps", stage.warmup_steps, "0 <= warmup < steps"
        )
        _require(stage.teachers != [], f"{where}.teachers", stage.teachers, "null for all, or at least one name")
        _require(
            stage.micro_batch_size is None or stage.micro_batch_size > 0,
            f"{where}.micro_batch_size",
            stage.micro_batch_size,
            "a whole number > 0, or null",
        )
        for teacher_name in stage.teachers or []:
            _one_of(f"{where}.teachers", teacher_name, tuple(recipe.teachers))
    for key in (f.name for f in fields(LossRecipe)):
        value = getattr(recipe.loss, key)
        _require(math.isfinite(value) and value >= 0, f"loss.{key}", value, "a finite number >= 0")
    for key in ("learning_rate", "max_grad_norm", "eps"):
        _require(getattr(recipe.optimizer, key) > 0, f"optimizer.{key}", getattr(recipe.optimizer, key), "> 0")
    _require(recipe.checkpoints.every_steps > 0, "checkpoints.every_steps", recipe.checkpoints.every_steps, "> 0")
    _require(recipe.checkpoints.keep > 0, "checkpoints.keep", recipe.checkpoints.keep, "> 0")
    _require(recipe.log_every_steps > 0, "log_every_steps", recipe.log_every_steps, "> 0")


def micro_batch(stage: StageRecipe, processes: int) -> tuple[int, int]:
    """(images a forward pass and process, forward passes an optimizer step)."""
    size = stage.micro_batch_size or stage.batch_size // processes
    if size <= 0 or stage.batch_size % (size * processes):
        raise ValueError(
            f"batch_size {stage.batch_size} does not split into {processes} processes x micro_batch_size {size}; "
            f"make it a multiple of {max(size, 1) * processes}, or set micro_batch_size"
        )
    return size, stage.batch_size // (size * processes)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, value, f"one of {', '.join(known)}")
