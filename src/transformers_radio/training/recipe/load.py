"""Reads a recipe: YAML and `key=value` -> `Recipe`, or one line that names the field and what was expected."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from transformers_radio.data import one_line
from transformers_radio.settings import check_interpolations, quoted, type_at

from .fields import Recipe
from .validate import validate

# `${package:quickstart/teachers/clip}` is a path inside the installed package.
OmegaConf.register_resolver(
    "package", lambda path: str(resources.files("transformers_radio").joinpath(path)), replace=True
)


def load_recipe(path: str | Path, overrides: list[str] | None = None, trust_code: bool = False) -> Recipe:
    """Reads a recipe, applies `key=value` overrides (`teachers.sam.summary_weight=0`) and validates the result.

    Args:
        trust_code: whether the teachers of this recipe may run code: those of the type `python`, and those with the
            option `trust_remote_code`. A module that this program has imported already is its own, and needs no trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown field (with the nearest known one), a wrong type, a missing value, values that do
            not fit together, or code without `trust_code`. The message names the field, the value and what was
            expected.
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
    _drop_removed_fields(loaded)
    for part in [loaded, *map(_parse_override, overrides)]:
        written = OmegaConf.to_container(part, resolve=False)
        check_interpolations(written, ("package",))
        _check_form(written, Recipe, "")
    try:
        recipe = _build(path, loaded, overrides)
        if not trust_code:
            _refuse_code(recipe)
        validate(recipe)
    except ValueError as error:
        raise ValueError(f"{error}{_meant(str(error), loaded, overrides)}") from error
    return recipe


def _drop_removed_fields(loaded: DictConfig) -> None:
    """Runs of earlier versions have recorded fields that are no more, at values that change nothing."""
    stages = loaded.get("stages")
    stages = list(stages.values()) if isinstance(stages, DictConfig) else []
    for section, name in [
        (loaded.get("student"), "weight_noise"),
        *((stage, "freeze_trunk_steps") for stage in stages),
    ]:
        if isinstance(section, DictConfig) and section.get(name) == 0:
            section.pop(name)


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


def _refuse_code(recipe: Recipe) -> None:
    """Raises ValueError for a teacher that is code, or loads it."""
    for name, teacher in recipe.teachers.items():
        code = None
        if teacher.options.get("trust_remote_code"):
            code = f"teachers.{name}.options.trust_remote_code runs the code that comes with {teacher.checkpoint}"
        elif teacher.type == "python":
            target = str(teacher.options.get("target") or teacher.checkpoint)
            if target.partition(":")[0] not in sys.modules:
                code = f"teachers.{name} is of the type python, so {target} runs"
        if code:
            raise ValueError(f"{code}: if you trust it, start with --trust-code (in Python: trust_code=True)")


def _parse_override(override: str) -> DictConfig:
    with _one_line_errors(f"override {override!r}"):
        return OmegaConf.from_dotlist([quoted(Recipe, override)])


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns what the libraries for YAML and settings raise into a ValueError of one line that begins with `what`."""
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
    """A copy with `~` expanded in the paths that training opens itself; data and teachers expand their own.

    The student's summary is written out where null stands for one, as earlier versions have recorded it in their runs.
    """
    student, cache = recipe.student, recipe.teacher_cache
    if student.summary is None and student.type == "radio":
        student = replace(student, summary="cls_per_teacher")
    return replace(
        recipe,
        output_dir=os.path.expanduser(recipe.output_dir),
        teacher_cache=None if cache is None else os.path.expanduser(cache),
        student=replace(student, checkpoint=student.checkpoint and os.path.expanduser(student.checkpoint)),
    )


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes YAML that `load_recipe` reads back as the same recipe."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(_escaped(recipe_to_dict(recipe)))), encoding="utf-8")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """All fields as plain dicts, lists and values."""
    container = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _escaped(value: Any) -> Any:
    """Values in which every ${ stands for itself: a recipe that was read has no interpolations any more."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(one) for one in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _check_emptied(overrides: list[str]) -> None:
    """Refuses `stages=null` before `stages.main.steps=3`: OmegaConf would silently ignore the first."""
    for number, override in enumerate(overrides):
        key, value = override.split("=", 1)
        later = [other for other in overrides[number + 1 :] if other.startswith(f"{key}.")]
        if later and value.strip().lower() in ("null", "~", ""):
            raise ValueError(
                f"override {override!r} does not empty {key} before {later[0]!r}: overrides add to what the recipe's "
                "file holds; remove it there, or override its fields one by one"
            )


def _check_form(written: Any, schema: Any, name: str) -> None:
    """Refuses unknown fields, with the one that was probably meant, and values of another form.

    OmegaConf would do so too, with messages that say less.

    Args:
        written: plain dicts, lists and values. Interpolations are left to OmegaConf.
        schema: the type of the field `name`.
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
    elif parts:  # a list or tuple
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
    """A hint at the name in the file that an override probably meant, where the message names one that it made."""
    for override in overrides:
        level, name = OmegaConf.to_container(loaded, resolve=False), ""
        for part in override.partition("=")[0].split("."):
            if not isinstance(level, dict):
                break
            if part not in level:
                parts = get_args(type_at(Recipe, name.rstrip(".")))
                near = difflib.get_close_matches(part, map(str, level), n=1)
                if near and parts and is_dataclass(parts[-1]) and f"{name}{part}" in message:
                    return f"; did you mean {name}{near[0]}?"
                break
            level, name = level[part], f"{name}{part}."
    return ""
