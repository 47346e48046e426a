"""Paths as users write them: what `~` stands for, what results call a path, and what its files are known by."""

import glob
import os
import re
from pathlib import Path

from transformers_radio.disk import fingerprint_files


def expand_home(path: str) -> str:
    """`path` with its leading `~` or `~user` replaced by that home folder; it may follow a TITLE= or a TYPE:."""
    before, home, after = re.fullmatch(r"((?:[^/]*[=:])?)(~[^/]*)?(.*)", path, re.DOTALL).groups()  # type: ignore[union-attr]
    return before + os.path.expanduser(home) + after if home else path


def path_name(path: str | Path) -> str:
    """What results call a path, a URL or a name on the Hub: its last part.

    `.` and `..` give the name of the folder that is meant, a pattern such as birds/*.tar the last part before the
    wildcards.
    """
    text = str(path)
    if "://" not in text and glob.has_magic(text) and not os.path.exists(text):
        plain = re.match(r"[^*?\[]*/", text)
        text = plain.group() if plain else text
    name = Path(text).name
    return Path(text).resolve().name if name in ("", "..") else name


def fingerprint_checkpoint(checkpoint: str | None) -> str | None:
    """What a checkpoint is known by: a name as it is, a path as a hash of its files; either may follow a TYPE:."""
    for start in [0, *(colon.end() for colon in re.finditer(":", checkpoint or ""))]:
        path = (checkpoint or "")[start:]
        if os.path.isfile(path):
            return (checkpoint or "")[:start] + fingerprint_files([path], os.path.dirname(path))
        if os.path.isdir(path):
            files = sorted(os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
            return (checkpoint or "")[:start] + fingerprint_files(files, path)
    return checkpoint
