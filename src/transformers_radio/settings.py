"""Settings are dataclasses. How `key=value` reaches their fields, and how a terminal shows them.

A field says what it means in its metadata: `field(default=0.9, metadata={"help": "alpha of equation 2"})`. Beside the
`help`, "range" is the interval of a number, such as "(0, 1]" (a round bracket leaves out its end, null is allowed
where the type allows it), and "choices" are the texts that the field may have. Nothing here needs torch.
"""

import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING


def describe_fields(schema: type, width: int | None = None) -> str:
    """All fields of a dataclass and of the dataclasses within it: name, type, default and help, as text to print.

    Args:
        schema: the dataclass. Each one within it begins with the first paragraph of its docstring.
        width: characters in a line; None for the terminal's.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    return "\n".join(_describe(schema, "", width))


def _describe(schema: type, prefix: str, width: int) -> Iterator[str]:
    types = get_type_hints(schema)
    sections = []
    for one in fields(schema):
        kind, name = types[one.name], f"{prefix}{one.name}"
        inner, place = kind, name
        while get_origin(inner) in (dict, list):  # X of dict[str, X] and of list[X]
            place += ".NAME" if get_origin(inner) is dict else "[NUMBER]"
            inner = get_args(inner)[-1]
        if isinstance(inner, type) and is_dataclass(inner):
            sections.append((inner, place))
            continue
        yield f"{name}: {_type(kind, one)}{_default(one)}"
        yield from _wrapped(one.metadata.get("help", ""), width)
    for inner, name in sections:
        yield ""
        yield name
        yield from _wrapped((inner.__doc__ or "").split("\n\n")[0], width)
        yield from _describe(inner, f"{name}.", width)


def _type(kind: Any, one: Field) -> str:
    """Such as "float in (0, 1]", "no | bf16 | fp16 | auto" or "list[str] | null"."""
    written = (kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)).replace("typing.", "")
    if "choices" in one.metadata:
        written = written.replace("str", " | ".join(one.metadata["choices"]))
    if "range" in one.metadata:
        number = "float" if "float" in written else "int"
        written = written.replace(number, f"{number} in {one.metadata['range']}")
    return written.replace("None", "null")


def _default(one: Field) -> str:
    """The default as YAML has it."""
    value = one.default if one.default_factory is NO_DEFAULT else one.default_factory()
    if value is NO_DEFAULT or value == MISSING:
        return " (required)"
    return f" = {value if value and isinstance(value, str) and value.isprintable() else json.dumps(value)}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def check_interpolations(written: Any, resolvers: tuple[str, ...] = (), field: str = "") -> None:
    """Refuses all of OmegaConf's interpolations but `${another.setting}`: `${oc.env:NAME}` would put a secret of this
    machine into an address that somebody else has written.

    Args:
        written: plain dicts, lists and values, as they are in a file.
        resolvers: names that are allowed too, as in `${package:some/path}`.
        field: what is written here, for the message: `data.path`.

    Raises:
        ValueError: a text has another one.
    """
    if isinstance(written, dict):
        for key, value in written.items():
            check_interpolations(key, resolvers, f"a name in {field}" if field else "a name")
            check_interpolations(value, resolvers, f"{field}.{key}" if field else str(key))
    elif isinstance(written, list):
        for number, value in enumerate(written):
            check_interpolations(value, resolvers, f"{field}[{number}]")
    elif isinstance(written, str):
        allowed = [r"[\w.\[\]-]+", *(rf"{name}:[^${{}}\\'\"]*" for name in resolvers)]
        if "${" in re.sub(rf"\\.|\$\{{({'|'.join(allowed)})\}}", " ", written, flags=re.DOTALL):  # \. is escaped
            kinds = " or ".join(["${another.setting}", *(f"${{{name}:...}}" for name in resolvers)])
            raise ValueError(
                f"{field or 'the file'} is {written!r}, which is not read, as it may tell others what is on this "
                f"machine; expected {kinds}, or the value itself (on a command line, the shell fills in variables)"
            )


def quoted(schema: Any, override: str) -> str:
    """`key=value` with a text in quotes.

    Without them YAML reads 2024_01, no or [2021] as other types, and what follows a # as a comment.

    Args:
        schema: the dataclass that the key is a field of.
    """
    key, _, value = override.partition("=")
    wanted = type_at(schema, key)
    is_text = wanted in (str, str | None) or (
        wanted is Any and "/" in value and os.path.exists(os.path.expanduser(value))
    )
    if not is_text or value in ("", "null", "~") or value[0] in "'\"":
        return override
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def type_at(schema: Any, key: str) -> Any:
    """The type of a field, such as int for "probe.iterations"; None where there is no such field."""
    for part in re.split(r"[.\[\]]+", key.rstrip("]")):
        hints = get_type_hints(schema) if is_dataclass(schema) else {}
        schema = hints[part] if part in hints else (get_args(schema) or (None,))[-1]
    return schema
