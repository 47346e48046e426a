import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from omegaconf import MISSING
from typer.testing import CliRunner

from transformers_radio.cli import app
from transformers_radio.settings import describe_fields, quoted, type_at
from transformers_radio.training.recipe import Recipe


@dataclass
class Inner:
    """A part.

    More about it.
    """

    share: float | None = field(default=None, metadata={"help": "Of the whole.", "range": "(0, 1]"})


@dataclass
class Outer:
    """All."""

    path: str = field(default=MISSING, metadata={"help": "Where it is: " + "a long way " * 5})
    mode: str = field(default="no", metadata={"help": "How.", "choices": ("no", "yes")})
    sides: tuple[int, int] = field(default=(1, 2), metadata={"help": "Both."})
    one: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)


def test_fields_are_shown_with_type_default_and_help():
    assert (
        describe_fields(Outer, width=40)
        == """path: str (required)
    Where it is: a long way a long way a
    long way a long way a long way
mode: no | yes = no
    How.
sides: tuple[int, int] = [1, 2]
    Both.

one
    A part.
one.share: float in (0, 1] | null = null
    Of the whole.

many.NAME
    A part.
many.NAME.share: float in (0, 1] | null = null
    Of the whole."""
    )


def recipe_sections(schema=Recipe):
    yield schema
    for kind in get_type_hints(schema).values():
        inner = (get_args(kind) or (kind,))[-1]
        if is_dataclass(inner):
            yield from recipe_sections(inner)


def test_every_field_of_a_recipe_has_its_help():
    text = CliRunner().invoke(app, ["train", "--fields"]).output
    for section in recipe_sections():
        assert section.__doc__ and not section.__doc__.startswith(f"{section.__name__}(")
        for one in fields(section):
            kind = get_type_hints(section)[one.name]
            if not is_dataclass((get_args(kind) or (kind,))[-1]):
                assert one.metadata["help"].endswith((".", ")")), (section, one.name)
                assert f"{one.name}: " in text
    assert "stages.NAME.groups.NAME.rate: float in (0, 1] = 1.0" in text
    assert "data.sources.NAME.weight: float = 1.0" in text


def test_the_fields_are_shown_without_torch():
    code = """import sys
from transformers_radio.settings import describe_fields
from transformers_radio.training.recipe import Recipe
print(len(describe_fields(Recipe)))
assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("path", str),
        ("one.share", float | None),
        ("many.some.share", float | None),
        ("many[some].share", float | None),
        ("sides[0]", int),
        ("nothing", None),
        ("one.nothing", None),
    ],
)
def test_the_type_of_a_field(key, expected):
    assert type_at(Outer, key) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("path=2024_01", 'path="2024_01"'),
        ("path=a # b", 'path="a # b"'),
        ("path='a'", "path='a'"),
        ("path=", "path="),
        ("mode=no", 'mode="no"'),
        ("one.share=0.5", "one.share=0.5"),
    ],
)
def test_texts_are_quoted(override, expected):
    assert quoted(Outer, override) == expected
