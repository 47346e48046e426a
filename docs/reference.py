"""The reference page, from the docstrings of the public names, the fields of settings, and the command line.

`docs/build.py` writes it; it is never committed.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from typer.main import get_command

from transformers_radio import cli
from transformers_radio.evaluation.run import TASKS, load_task
from transformers_radio.settings import describe_fields
from transformers_radio.training import Recipe
from transformers_radio.visualization.run import VisualizeConfig

WIDTH = 100  # characters in a line of code
# heading -> (module that the names are imported from, names); every public name of the package is in one of them
NAMES: dict[str, list[tuple[str, list[str]]]] = {
    "Students": [
        ("transformers_radio", ["RadioModel", "RadioConfig", "ERadioModel", "ERadioConfig"]),
        ("transformers_radio", ["RadioTimmModel", "RadioTimmConfig", "RadioImageProcessor"]),
        ("transformers_radio", ["RadioModelOutput", "AdaptorOutput", "load_student", "register"]),
    ],
    "Task heads, backbones and towers": [
        ("transformers_radio", ["RadioForImageClassification", "RadioForSemanticSegmentation"]),
        ("transformers_radio", ["ERadioForImageClassification", "ERadioForSemanticSegmentation"]),
        ("transformers_radio", ["RadioBackbone", "RadioBackboneConfig", "ERadioBackbone"]),
        ("transformers_radio", ["RadioPyramidBackbone", "RadioPyramidConfig"]),
        ("transformers_radio", ["RadioVisionTower", "RadioVisionTowerConfig", "RadioLlavaProcessor"]),
    ],
    "In other models": [
        ("transformers_radio.integrations", list(import_module("transformers_radio.integrations").__all__))
    ],
    "Teachers": [
        ("transformers_radio.teachers", ["build_teacher", "Teacher", "TeacherOutput"]),
        ("transformers_radio.teachers", ["load_text_encoder", "has_text", "load_sam", "digest_weights"]),
    ],
    "Data": [("transformers_radio.data", ["DataConfig", "SourceConfig", "ImageStream", "Batch", "merge_states"])],
    "Training": [("transformers_radio.training", ["load_recipe", "train", "TrainResult"])],
    "Evaluation": [
        ("transformers_radio.evaluation.run", ["run_task"]),
        ("transformers_radio.evaluation", list(import_module("transformers_radio.evaluation").__all__)),
    ],
    "Pictures": [("transformers_radio.visualization.run", ["visualize"])],
    "Export, conversion, publishing": [
        ("transformers_radio.export.run", ["export_student"]),
        ("transformers_radio.hub.convert", ["load_nvidia_checkpoint"]),
        ("transformers_radio.hub.folder", ["convert"]),
        ("transformers_radio.publishing.publish", ["prepare", "upload"]),
    ],
}


def reference() -> str:
    """The page, as Markdown."""
    described: dict[Any, str] = {}  # a method or property -> the first class with it
    lines = ["# Reference", "", "Made from the docstrings and the fields of settings of this version.", ""]
    for heading, groups in NAMES.items():
        lines += [f"## {heading}", ""]
        for module, names in groups:
            for name in names:
                lines += describe(module, name, described)
    lines += ["## Command line", ""]
    for name, command in get_command(cli.app).commands.items():
        lines += describe_command(name, command)
    lines += ["## Fields of a recipe", "", "`transformers-radio train --fields` prints them.", ""]
    lines += code(describe_fields(Recipe, WIDTH), "text")
    lines += ["## Settings of the tasks", "", "`transformers-radio eval TASK --help` prints them.", ""]
    for task in TASKS:
        lines += [f"### eval {task}", "", *code(describe_fields(load_task(task).config_class, WIDTH), "text")]
    lines += ["### visualize KIND", "", *code(describe_fields(VisualizeConfig, WIDTH), "text")]
    return "\n".join(lines)


def describe(module: str, name: str, described: dict[Any, str]) -> Iterator[str]:
    """Heading, import, signature and docstring of a function or class; of a class its members too."""
    found = getattr(import_module(module), name)
    yield from (f"### {name}", "")
    yield from code(f"from {module} import {name}")
    if inspect.isclass(found):
        yield from describe_class(found, described)
    elif callable(found):
        yield from code(signature(name, found))
        yield from markdown(found.__doc__)


def describe_class(found: type, described: dict[Any, str]) -> Iterator[str]:
    """Docstring, fields of settings, and members; those that an earlier class has as well are named only."""
    yield from markdown(found.__doc__)
    if is_dataclass(found) and any("help" in one.metadata for one in fields(found)):
        yield from code(describe_fields(found, WIDTH), "text")
    shared: dict[str, list[str]] = {}  # earlier class -> members
    seen = set()
    for owner in found.__mro__:
        if not owner.__module__.startswith("transformers_radio"):
            continue
        for name, member in vars(owner).items():
            plain = getattr(member, "__func__", getattr(member, "fget", member))  # of classmethods and properties
            if name.startswith("_") or name in seen or not inspect.isfunction(plain) or not plain.__doc__:
                continue
            seen.add(name)
            if plain in described:
                shared.setdefault(described[plain], []).append(f"`{name}`")
                continue
            described[plain] = found.__name__
            if isinstance(member, property):
                yield from (f"#### {found.__name__}.{name}", "")
            else:
                yield from (f"#### {found.__name__}.{name}()", "", *code(signature(name, getattr(found, name))))
            yield from markdown(plain.__doc__)
    for earlier, names in shared.items():
        yield from (f"As `{earlier}` has them: {', '.join(names)}.", "")


def describe_command(name: str, command: Any) -> Iterator[str]:
    """A command of `transformers-radio` with its arguments and options, as a table."""
    yield from (f"### transformers-radio {name}", "", escape(inspect.cleandoc(command.help)), "")
    yield from ("| argument or option | meaning |", "|---|---|")
    for one in command.params:
        if one.name == "help":
            continue
        called = ", ".join(one.opts) if one.param_type_name == "option" else (one.metavar or one.name.upper())
        default = "" if one.default in (None, False) or callable(one.default) else f" Default: `{one.default}`."
        yield f"| `{called}` | {escape(one.help or '')}{default} |".replace("||", "|")
    yield ""


def signature(name: str, function: Any) -> str:
    """`name(...)` as in the source, one parameter per line where one line does not hold it."""
    found = inspect.signature(function)
    without = [one.replace(annotation=one.empty) for one in found.parameters.values() if one.name != "self"]
    short = str(found.replace(parameters=without, return_annotation=inspect.Signature.empty))
    if len(name + short) <= WIDTH:
        return name + short
    return f"{name}(\n" + "".join(f"    {one},\n" for one in without) + ")"


def code(text: str, language: str = "python") -> list[str]:
    return [f"```{language}", *text.rstrip().splitlines(), "```", ""]


def markdown(docstring: str | None) -> Iterator[str]:
    """A docstring with sections (Args, Returns, ...) as Markdown."""
    section = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        listed = section in ("Args", "Attributes", "Raises")
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            section = heading[1]
            yield from (f"**{section}**", "")
        elif section and line and not line.startswith(" "):
            section = ""
            yield escape(line)
        elif listed and (item := re.match(r" {4}([\w.*]+(?:, [\w.*]+)*)( \(.*\))?: (.*)", line)):
            kind = escape((item[2] or "").replace("*optional*", "optional"))
            yield f"- `{item[1]}`{kind}: {escape(item[3])}"
        elif section:
            yield ("    " * listed + escape(line.strip())).rstrip()
        else:
            yield line if line.startswith("    ") else escape(line)
    yield ""


def escape(text: str) -> str:
    """Text outside of `code` spans without what Markdown would read as markup; references as plain code."""
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
    return "".join(parts)
