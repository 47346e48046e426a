"""A recipe is one YAML file over these dataclasses; every field can be overridden as `key=value`."""

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from transformers_radio.data import DataConfig, one_line

from .validate import validate


@dataclass
class StudentRecipe:
    """The student encoder. `checkpoint` starts from a saved student, otherwise it is built from `size`."""

    size: str = "vit-b-16"  # a name from RadioConfig.sizes()
    config: dict[str, Any] = field(
        default_factory=dict
    )  # fields of RadioConfig that differ from the size's (checkpoint's)
    checkpoint: str | None = None  # a student's folder or Hub id, in place of `size`
    keep_adaptors: list[str] | None = None  # the checkpoint's without a teacher here that stay, frozen; null: all
    summary: str = "cls_per_teacher"  # cls_per_teacher | cls | mean (paper Table 5)
    head_hidden_dim: int | None = None  # null: the widest teacher (paper section 3.2)
    gradient_checkpointing: bool = False
    # sdpa | eager | flash_attention_2. Eager is the fastest on a CPU with few tokens, where sdpa has a slow backward
    attn_implementation: str = "sdpa"
    compile: bool = False  # torch.compile the encoder's blocks
    # Spectral reparametrisation of the encoder's Linears (paper section 4: it steadies training at high resolution).
    spectral_reparam: bool = False
    weight_noise: float = 0.0  # standard deviation of multiplicative noise on these weights while training; 0: none


@dataclass
class TeacherRecipe:
    """One frozen teacher. Its name in the recipe is the name of the student's adaptor."""

    type: str = MISSING  # open_clip | transformers | segment_anything | timm | python
    checkpoint: str = MISSING  # Hub id, local path, or module:Class
    image_size: int | None = None  # pixels; null: the teacher's own
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto: bfloat16 where the device has units for it
    placement: str = "device"  # device | offloaded (on the CPU, a block at a time) | sharded (over its processes)
    compile: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of this type, e.g. features: neck for SAM
    summary_weight: float = 1.0  # lambda_i of equation 1; a teacher without a summary (SAM) has no such term
    feature_weight: float = 1.0  # gamma_i of equation 3


@dataclass
class LossRecipe:
    """Equations 1 to 3 and how their terms are balanced (section 3.4.1, Table 4)."""

    cosine_weight: float = 0.9  # alpha of equation 2
    smooth_l1_weight: float = 0.1  # beta of equation 2
    smooth_l1_beta: float = 2.0  # the turning point is not in the paper; this is a later NVIDIA trainer's
    grid: str = "larger"  # larger | smaller: on which of the two feature grids student and teacher are compared
    balancing: str = "naive"  # naive | uncertainty | adaloss | amtml_kd
    # none | phi_s: teachers' features in units of equal variance (PHI-S); saved heads speak the teacher's own space
    standardization: str = "none"
    statistics_images: int = 3000  # that PHI-S looks at for each teacher, before a stage; ours


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
class GroupRecipe:
    """Teachers that see the same images at one student resolution (paper section 4, partitioning)."""

    teachers: list[str] | None = None  # null: all
    resolution: int = MISSING  # student input side in pixels
    batch_size: int = MISSING  # images an optimizer step, over all processes of the group
    micro_batch_size: int | None = None  # images a forward pass and process; null: batch_size / processes
    share: float = 1.0  # of the processes, relative to the other groups'
    rate: float = 1.0  # share of the steps that it takes part in; at least one group of a stage has 1


@dataclass
class StageRecipe:
    """A stretch of training with its own warm-up and cosine schedule: one group of teachers, or several."""

    steps: int = MISSING  # optimizer steps
    resolution: int = 0  # these four describe the only group of a stage that has no `groups`
    batch_size: int = 1024
    micro_batch_size: int | None = None
    teachers: list[str] | None = None
    groups: dict[str, GroupRecipe] = field(default_factory=dict)
    # per_image: all images of a step count the same; per_rank: a group counts by its share of the processes
    weighting: str = "per_image"
    warmup_steps: int = 0
    learning_rate: float | None = None  # null: the optimizer's
    weight_decay: float | None = None
    freeze_trunk_steps: int = 0  # first steps in which only the heads learn

    def teacher_names(self, recipe: "Recipe") -> list[str]:
        """The teachers of all its groups, in the recipe's order."""
        lists = [group.teachers for group in self.groups.values()] or [self.teachers]
        return [name for name in recipe.teachers if any(not listed or name in listed for listed in lists)]

    def preferred_resolution(self, summarised: set[str]) -> int:
        """The resolution in pixels at which teachers with a summary see the most images, or else the highest.

        At the resolution of groups without one (SAM's, in the paper) the student's summary has never been trained.

        Args:
            summarised: the teachers that have a summary.
        """
        if not self.groups:
            return self.resolution
        groups = list(self.groups.values())
        trained = [group for group in groups if summarised & set(group.teachers or summarised)]
        if not trained:
            return max(group.resolution for group in groups)
        return max((group.batch_size * group.rate, group.resolution) for group in trained)[1]


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
    # A folder for the teachers' outputs, which are then computed once an image; needs data.frozen_crops. null: none
    teacher_cache: str | None = None
    # no | bf16 | fp16 | auto: bf16 where the device has units for it, else no
    mixed_precision: str = "no"
    ema_decay: float | None = None  # null: none; else the checkpoints hold the moving average of the weights
    seed: int = 0
    log_every_steps: int = 10
    tracker: str | None = "tensorboard"  # any tracker of Accelerate; null: metrics.jsonl alone
    # true: when the saved position cannot be dealt to this number of processes, or the data has changed, the
    # pass over the data begins again; false: that is an error
    restart_data: bool = False
    overwrite: bool = False  # true: a finished run, or one of another recipe, in output_dir is deleted


# `${package:quickstart/teachers/clip}` is a path inside the installed package.
OmegaConf.register_resolver(
    "package", lambda path: str(resources.files("transformers_radio").joinpath(path)), replace=True
)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe, applies `key=value` overrides (`teachers.sam.summary_weight=0`) and validates the result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown field (with the nearest known one), a wrong type, a missing value, or values that do
            not fit together. The message names the field, the value and what was expected.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; recipes are YAML files, see the folder recipes/")
    overrides = list(overrides or [])
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value, e.g. stages.main.steps=100")
    _check_emptied(overrides)
    with _one_line_errors(f"{path} cannot be read as YAML"):
        loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} is not a mapping of recipe fields")
    for part in [loaded, *map(_parse_override, overrides)]:
        _check_form(OmegaConf.to_container(part, resolve=False), Recipe, "")
    try:
        recipe = _build(path, loaded, overrides)
        validate(recipe)
    except ValueError as error:
        raise ValueError(f"{error}{_meant(str(error), loaded, overrides)}") from error
    return recipe


def _build(path: Path, loaded: DictConfig, overrides: list[str]) -> Recipe:
    with _one_line_errors(f"recipe {path}"):
        written = OmegaConf.merge(loaded, OmegaConf.from_dotlist([quoted(Recipe, override) for override in overrides]))
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), written)
        missing = sorted(OmegaConf.missing_keys(written) | OmegaConf.missing_keys(merged))
        recipe = None if missing else OmegaConf.to_object(merged)
    if missing:
        raise ValueError(f"recipe {path} leaves {', '.join(missing)} unset")
    assert isinstance(recipe, Recipe)
    if recipe.mixed_precision == "False":  # YAML reads a bare no as false
        recipe.mixed_precision = "no"
    return expand_paths(recipe)


def _parse_override(override: str) -> DictConfig:
    with _one_line_errors(f"override {override!r}"):
        return OmegaConf.from_dotlist([quoted(Recipe, override)])


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """What the libraries of YAML and settings raise, as a ValueError that begins with `what`."""
    try:
        yield
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        hint = " (a tab? YAML is indented with spaces)" if "cannot start any token" in (problem or "") else ""
        raise ValueError(f"{what}: {place}{problem or one_line(error)}{hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: it is not UTF-8 text ({error}); save it as such") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        hint = r" (a ${ that stands for itself is written \${)" if isinstance(error, GrammarParseError) else ""
        raise ValueError(f"{what}: {key}{str(error).splitlines()[0]}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{what}: values are nested too deeply") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def expand_paths(recipe: Recipe) -> Recipe:
    """A copy with `~` expanded in the paths that training opens itself; data and teachers expand their own."""
    student, cache = recipe.student, recipe.teacher_cache
    return replace(
        recipe,
        output_dir=os.path.expanduser(recipe.output_dir),
        teacher_cache=None if cache is None else os.path.expanduser(cache),
        student=replace(student, checkpoint=student.checkpoint and os.path.expanduser(student.checkpoint)),
    )


def quoted(schema: Any, override: str) -> str:
    """`key=value`, a text in quotes, without which YAML takes 2024_01, no, [2021] and what follows # for others."""
    key, _, value = override.partition("=")
    wanted = _type_at(schema, key)
    is_text = wanted in (str, str | None) or (
        wanted is Any and "/" in value and os.path.exists(os.path.expanduser(value))
    )
    if not is_text or value in ("", "null", "~") or value[0] in "'\"":
        return override
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _type_at(schema: Any, key: str) -> Any:
    """The type of a setting, such as int for "probe.iterations"; None where there is no such setting."""
    for part in re.split(r"[.\[\]]+", key.rstrip("]")):
        hints = get_type_hints(schema) if is_dataclass(schema) else {}
        schema = hints[part] if part in hints else (get_args(schema) or (None,))[-1]
    return schema


def save_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)), encoding="utf-8")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _check_emptied(overrides: list[str]) -> None:
    """OmegaConf drops `stages=null` without a word when `stages.main.steps=3` follows."""
    for number, override in enumerate(overrides):
        key, value = override.split("=", 1)
        later = [other for other in overrides[number + 1 :] if other.startswith(f"{key}.")]
        if later and value.strip().lower() in ("null", "~", ""):
            raise ValueError(
                f"override {override!r} does not empty {key} before {later[0]!r}: overrides add to what the recipe's "
                f"file holds; remove it there, or override its fields one by one"
            )


def _check_form(written: Any, schema: Any, name: str) -> None:
    """Unknown fields, with the one that was probably meant, and values of another form: OmegaConf says either less.

    Args:
        written: plain dicts, lists and values. Interpolations are left to OmegaConf.
        schema: the type that the field `name` has.
    """
    parts = get_args(schema)
    if written == MISSING or (isinstance(written, str) and "${" in written):
        return
    if type(None) in parts:  # X | None
        if written is not None:
            _check_form(written, parts[0], name)
    elif is_dataclass(schema):
        known = get_type_hints(schema)
        _expect(isinstance(written, dict), name, written, f"a mapping with fields of {', '.join(known)}")
        for key, value in written.items():
            inner = f"{name}.{key}" if name else f"{key}"
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                meant = inner.removesuffix(f"{key}") + "".join(near)
                hint = f"did you mean {meant}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown recipe field {inner}; {hint}")
            _check_form(value, known[key], inner)
    elif get_origin(schema) is dict:
        _expect(isinstance(written, dict), name, written, "a mapping, as name: value")
        for key, value in written.items():
            _expect(isinstance(key, str), f"a name in {name}", key, "a text: write it in quotes")
            _check_form(value, parts[1], f"{name}.{key}")
    elif parts:  # of a list or tuple
        expected = f"a list of {len(parts)} numbers" if get_origin(schema) is tuple else "a list, as [one, another]"
        _expect(isinstance(written, list), name, written, expected)
        _expect(get_origin(schema) is list or len(written) == len(parts), name, written, expected)
        for value in written:
            _check_form(value, parts[0], name)
    elif schema is not Any:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[schema]
        _expect(_is_a(written, schema), name, written, expected)


def _is_a(value: Any, schema: type) -> bool:
    """Whether a value can become an int, float, bool or str. Numbers may be written as text."""
    if value is None or isinstance(value, dict | list | bytes):
        return False
    if schema is bool:
        return isinstance(value, bool | str) or value in (0, 1)
    if schema is str:
        return True
    if isinstance(value, bool) or (schema is int and isinstance(value, float)):
        return False
    try:
        return schema(value) is not None
    except (ValueError, OverflowError):
        return False


def _expect(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        found = "null" if value is None else repr(value)
        raise ValueError(f"{name} is {found}; expected {expected}")


def _meant(message: str, loaded: DictConfig, overrides: list[str]) -> str:
    """The name in the file that an override probably meant, where the message is about one that it has made."""
    for override in overrides:
        level, name = OmegaConf.to_container(loaded, resolve=False), ""
        for part in override.partition("=")[0].split("."):
            if not isinstance(level, dict):
                break
            if part not in level:
                parts = get_args(_type_at(Recipe, name.rstrip(".")))
                near = difflib.get_close_matches(part, map(str, level), n=1)
                if near and parts and is_dataclass(parts[-1]) and f"{name}{part}" in message:
                    return f"; did you mean {name}{near[0]}?"
                break
            level, name = level[part], f"{name}{part}."
    return ""
