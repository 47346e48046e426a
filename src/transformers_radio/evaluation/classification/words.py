"""Class names and prompt templates of zero-shot classification."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_radio.evaluation.paths import expand_home

from .zero_shot import Template, openai_imagenet_templates

logger = logging.getLogger(__name__)

OPENAI_IMAGENET = "openai_imagenet"  # instead of a file: what OpenAI published for ImageNet-1k, from open_clip
IMAGENET, IMAGENET_CLASSES = "ImageNet-1k", 1000


def load_class_names(given: str | Sequence[str] | None, stated: list[str] | None, data: str) -> list[str]:
    """One name per class, in the order of the labels.

    Args:
        given: a text file with one name per line, "openai_imagenet", a list, or None for the names of the data.
        stated: the names that the data states; None where it states none.
        data: what the data is called, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, an empty one, or another number than the data has classes.
    """
    if given is None:
        if stated is None:
            raise ValueError(f"{data} does not state the names of its classes: give them with classes=FILE.")
        if all(re.fullmatch(r"n\d{8}", name) for name in stated):
            raise ValueError(
                f"The classes of {data} are called by WordNet ids such as {stated[0]}, which no text tower knows: "
                f"give words with classes=FILE, or classes={OPENAI_IMAGENET} for the 1000 of ImageNet-1k."
            )
        return stated
    if given == OPENAI_IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES  # only this needs the package

        names = list(IMAGENET_CLASSNAMES)
    else:
        names = read_lines(given) if isinstance(given, str) else list(given)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            logger.warning("class names that stand for several classes: %s; only the first can be chosen", twice)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"classes has an empty name or none at all; expected a name for each class: {names[:5]} ...")
    if stated is not None and len(names) != len(stated):
        raise ValueError(
            f"There are {len(names)} class names, but {data} has {len(stated)} classes: give one name per class, in "
            "the order of the labels."
        )
    return names


def warn_of_other_classes(name: str | None, given: Any, data: str, there: int) -> None:
    """Warns if results would have the name of a set with another number of classes.

    Args:
        name: what results call the data.
        given: the names of the classes as for `load_class_names`, which tell how many there should be.
        there: number of classes that the data has.
    """
    if given is None or given == OPENAI_IMAGENET:
        is_imagenet = given == OPENAI_IMAGENET or (name or "").lower().startswith(IMAGENET.lower())
        promised = IMAGENET_CLASSES if is_imagenet else there
    else:
        promised = len(read_lines(given) if isinstance(given, str) else given)
    if there != promised:
        logger.warning(
            "%s should have %d classes, but %s has %d: results are not those of the whole set. Give the data another "
            "name with name=..., and its own classes.",
            name or data,
            promised,
            data,
            there,
        )


def load_templates(given: str | Sequence[str]) -> Sequence[Template]:
    """The templates of a text file (one per line, with one {} for the class name), of a list, or "openai_imagenet".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a template without a {}, or with other braces.
    """
    if given == OPENAI_IMAGENET:
        return openai_imagenet_templates()
    templates = read_lines(given) if isinstance(given, str) else list(given)
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise ValueError(f"The template {template!r} needs one {{}} for the class name, and no other braces.")
    if not templates:
        raise ValueError("templates is empty; expected at least one, such as a photo of a {}.")
    return templates


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, without spaces around them; empty lines only at its end."""
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; expected a text file with one entry per line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    if "" in lines:
        raise ValueError(f"Line {lines.index('') + 1} of {path} is empty; expected one entry per line.")
    return lines
