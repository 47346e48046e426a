"""A folder that is a Space on the Hub: the student's page, with everything that it needs."""

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from transformers_radio import __version__
from transformers_radio.disk import check_new, new_folder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.publishing.card import read_card
from transformers_radio.publishing.publish import student_files

APP = '''"""The page of a student that was distilled with transformers_radio."""

from pathlib import Path

from transformers_radio.demo.page import serve

STUDENT = {title!r} + "=" + str(Path(__file__).parent / "student")
TEACHERS = {teachers!r}  # in the place of those that the student records

if __name__ == "__main__":
    # None: the Space says where to listen. What the student records by a Hub id is fetched from there.
    serve(STUDENT, TEACHERS, host=None)
'''
README = """---
{metadata}
---

# {title}

A student that was distilled from several vision models with `transformers_radio`. Drop an image to see its features
beside those of its teachers, compare it with labels of your own, and click on a thing for its mask. The parts that
need a teacher whose weights are not at hand are left out; the page says which and why.

`app.py` is the whole Space: `transformers-radio demo DIR --space FOLDER` wrote it. On your own machine, in a checkout
of this Space: `pip install -r requirements.txt gradio && python app.py`.
"""


def write_space(student: str, folder: Path, teachers: Mapping[str, str] | None = None) -> list[Path]:
    """Writes the files of a Space: app.py, requirements.txt, README.md, and the student itself.

    Args:
        student: the folder of a student with a model card; TITLE= before it names the page.
        folder: new, or empty.
        teachers: adaptor -> TYPE:CHECKPOINT, as for `models.load_models`, of checkpoints on the Hub.

    Raises:
        FileExistsError: the folder holds something.
        FileNotFoundError: there is no student, or its folder lacks a file.
        OSError: the folder cannot be written.
        ValueError: the card has no license, a teacher is a file of this machine, or the folder lies in the student's.
    """
    spec = ModelSpec.parse(student)
    source = Path(spec.checkpoint)
    check_new(folder, "--space", source)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}: a Space takes a student from a folder of this machine.")
    for adaptor, teacher in (teachers or {}).items():
        if os.path.exists(os.path.expanduser(teacher.partition(":")[2])):
            raise ValueError(f"{adaptor}={teacher} is a file of this machine, which the Space would not have.")
    files = student_files(source)
    card: Any = read_card(source).data
    if not card.license:
        raise ValueError(f"The model card of {source} names no license: add `license:` to its front matter.")
    more: dict[str, Any] = {"license_name": card.license_name, "license_link": card.license_link}
    more = {name: value for name, value in more.items() if value}  # of a license that is "other"
    more |= {"emoji": "🖼️", "colorFrom": "blue", "colorTo": "green", "pinned": False}
    data = SpaceCardData(
        title=spec.title,
        sdk="gradio",
        sdk_version=version("gradio"),
        app_file="app.py",
        license=card.license,
        tags=["transformers_radio", "feature-extraction"],
        **more,
    )
    with new_folder(folder, "--space", source) as temporary:
        for name, content in files.items():
            target = temporary / "student" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, target)
        (temporary / "app.py").write_text(
            APP.format(title=spec.title, teachers=dict(teachers or {})), encoding="utf-8"
        )
        requirements = f"transformers_radio[demo,teachers]=={__version__}\n"
        (temporary / "requirements.txt").write_text(requirements, encoding="utf-8")
        readme = README.format(metadata=data.to_yaml(), title=spec.title)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return [folder / name for name in ("app.py", "requirements.txt", "README.md", "student")]
