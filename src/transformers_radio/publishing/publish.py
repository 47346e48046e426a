"""`transformers-radio publish`: a student's folder becomes one commit on the Hub, or is refused with the reason."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from transformers_radio.data import one_line
from transformers_radio.evaluation.report.collect import IS_RESULT
from transformers_radio.evaluation.result import Result
from transformers_radio.modeling import student_class
from transformers_radio.teachers.licenses import License, needs_copy, objection, read_license, student_license
from transformers_radio.training.run.card import (
    CARD,
    RECIPE,
    REPO_ID,
    TEACHERS,
    all_teachers,
    license_text,
    replace_block,
)

from .card import add_results, empty_student, read_card, read_manifest, results_of
from .eval_results import eval_result_files
from .loaders import check_loaders

PROCESSOR = "preprocessor_config.json"
RESULTS = "evaluation"  # the folder of result files in the repository
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# Of an older version, these could be loaded in the place of what is uploaded now.
REPLACED = (".safetensors", ".safetensors.index.json", ".py")


@dataclass
class Publication:
    """What goes into the commit.

    Attributes:
        files: path in the repository -> the file, or its content.
        card: the model card among them.
        notes: what a reader of the dry run should know.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    card: ModelCard
    notes: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def prepare(
    folder: Path,
    repo_id: str,
    results: Sequence[Path] = (),
    license_override: str | None = None,
    benchmarks: Mapping[str, str] | None = None,
    trust_code: bool = False,
) -> Publication:
    """Checks all that can be checked without the Hub, and gathers what `upload` sends.

    Args:
        folder: a student: weights, code, processor, README.md; recipe.yaml and teacher_manifest.json if training
            left them.
        repo_id: ORG/NAME.
        results: folders of results; those of this student go into the card and along.
        license_override: why the card's license may be another than the teachers' leave, in words that go into it.
        benchmarks: data of these results -> its id on the Hub: results on it also go as `.eval_results/*.yaml`.
        trust_code: whether the folder's code may be another than this version's. It runs here, and at the readers'.

    Raises:
        OSError: there is no such folder, or a file in it is missing.
        ValueError: an impossible repo_id; the card lacks license or data; a teacher's license forbids the student's;
            files that may run code when they are loaded; code that is not this version's, without `trust_code`; links
            to outside of the folder; or the folder does not open in all ways.
    """
    _check_repo_id(repo_id)
    files = student_files(folder)
    if not trust_code:
        _check_code(folder, files)
    card = read_card(folder)
    data: Any = card.data
    notes = []
    if not data.datasets:
        raise ValueError(
            f"{folder / CARD} names no data: add `datasets:` to its front matter, a list of the ids of data sets on "
            "the Hub, or of names, and describe the others in the text"
        )
    notes += _check_license(folder, card, license_override)
    notes += [f"{name} is not in {folder}: the training is not documented by it" for name in (RECIPE, TEACHERS) if
              name not in files]  # fmt: skip
    if results:
        ours = results_of(folder, results)
        if not ours:
            raise ValueError(f"there are no results of {folder} in {', '.join(map(str, results))}")
        add_results(card, ours)
        files |= {f"{RESULTS}/{name}": content for name, content in _result_files(ours, repo_id)}
        files |= dict(eval_result_files(ours, benchmarks or {}))
    elif benchmarks:
        raise ValueError("--eval-results needs results to write: name their folder with --results")
    elif not data.eval_results:
        notes.append("nothing measured goes along: name results with --results")
    notes += check_loaders(folder)
    card.text = card.text.replace(REPO_ID, repo_id)
    files[CARD] = str(card).encode()
    return Publication(repo_id, dict(sorted(files.items())), card, notes)


def stale_files(publication: Publication) -> list[str]:
    """Weights and code in the repository that this version does not have; none where there is no repository yet."""
    try:
        there = HfApi().list_repo_files(publication.repo_id)
    except RepositoryNotFoundError:
        return []
    return [name for name in there if name.endswith(REPLACED) and name not in publication.files]


def upload(publication: Publication, private: bool = False) -> CommitInfo:
    """Sends everything as one commit; the repository is made if it is not there. Stale weights and code are deleted.

    Nothing is visible before the commit, so an interrupted upload leaves the repository as it was. The next one sends
    no file again that has arrived whole.

    Args:
        private: makes a new repository private; an existing one keeps its visibility.

    Raises:
        OSError: the Hub cannot be reached, refuses, or the connection ends.
    """
    api = HfApi()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in publication.files.items()
    ]
    try:
        api.create_repo(publication.repo_id, private=private or None, exist_ok=True)
        operations += [CommitOperationDelete(name) for name in stale_files(publication)]
        return api.create_commit(publication.repo_id, operations, commit_message="Publish the student")
    except Exception as error:  # of the client for HTTP, which it is not ours to know
        if isinstance(error, (TypeError, AttributeError, KeyError)):
            raise
        reason = one_line(error.__cause__ or error)
        raise OSError(
            f"{publication.repo_id} was not published ({reason}): run the same command again; files that have "
            "arrived are not sent again"
        ) from error


def describe(publication: Publication) -> Iterable[str]:
    """The lines of a dry run: every file with its size, the card's metadata, and notes."""
    yield f"{publication.repo_id}: {len(publication.files)} files in one commit"
    for name in publication.files:
        yield f"{publication.size(name):>15,}  {name}"
    yield f"{sum(map(publication.size, publication.files)):>15,}  bytes"
    yield f"metadata of {CARD}:"
    yield from (f"  {line}" for line in publication.card.data.to_yaml().splitlines())
    yield from publication.notes


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo-id {repo_id!r} is not a name on the Hub: {one_line(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"--repo-id is {repo_id!r}; expected ORG/NAME, with your user name or organization")


def student_files(folder: Path) -> dict[str, Path | bytes]:
    """Every file of the folder but hidden ones, by its path in the repository."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not (folder / "config.json").is_file() and (folder / "student" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is a run; the student is in {folder / 'student'}")
    student = empty_student(folder)
    if (folder / "training_state").exists():
        raise ValueError(f"{folder} is a checkpoint of a run, with the state of training; publish the run's student/")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = student_class(config["model_type"]).__name__
    if config.get("architectures", [expected]) != [expected]:
        raise ValueError(
            f"{folder} holds a {', '.join(config['architectures'])}, and publish is for students ({expected}); its "
            "push_to_hub uploads a model with a task head"
        )
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    outside = [path for path in found if not path.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ValueError(f"{outside[0]} is a link to {outside[0].resolve()}, outside of {folder}: remove or copy it")
    files = {path.relative_to(folder).as_posix(): path for path in found}
    files = {name: path for name, path in files.items() if not any(part[0] == "." for part in PurePath(name).parts)}
    pickles = [name for name in files if PurePath(name).suffix in PICKLES]
    if pickles:
        raise ValueError(f"{', '.join(pickles)} in {folder} may run code when loaded: remove it, or save safetensors")
    code = {reference.partition(".")[0] + ".py" for reference in config.get("auto_map", {}).values()}
    missing = sorted({PROCESSOR, *code} - files.keys())
    if not any(name.endswith(".safetensors") for name in files):
        missing.append("model.safetensors")
    if missing or not code:
        what = ", ".join(missing) or f"code for {type(student).__name__}"
        raise FileNotFoundError(
            f"{folder} lacks {what}: save the student with save_pretrained, and a RadioImageProcessor beside it"
        )
    return dict(files)


def _check_code(folder: Path, files: dict[str, Path | bytes]) -> None:
    """Raises ValueError unless all code is this version's: what is published may have come from elsewhere."""
    student = empty_student(folder)
    sources = [path for kind in type(student).__mro__ if (path := _source(kind)) is not None]
    own = {file.name: file for source in sources for file in source.parent.glob("*.py")}
    for name, file in files.items():
        if isinstance(file, Path) and name.endswith(".py"):
            same = own.get(file.name)  # also below the folder: programs of torch-export have the code beside them
            if same is None or file.read_bytes() != same.read_bytes():
                raise ValueError(
                    f"{name} in {folder} is not this version's code. Save the student again (from_pretrained, "
                    "save_pretrained), or read the file and allow it with --trust-code"
                )


def _source(kind: type) -> Path | None:
    """The file of a student's class, whose folder holds its remote code; None for a class of another library."""
    is_library = kind.__module__.partition(".")[0] in ("builtins", "torch", "transformers")
    file = None if is_library else getattr(sys.modules.get(kind.__module__), "__file__", None)
    return None if file is None else Path(file)


def _check_license(folder: Path, card: ModelCard, override: str | None) -> list[str]:
    """Notes about the license; with an override its reason goes into the card."""
    entries = all_teachers(empty_student(folder).config, read_manifest(folder))
    teachers = {name: read_license(entry["license"]) for name, entry in entries.items()}
    proposed, reasons = student_license(teachers)
    why = " ".join(reasons)
    data: Any = card.data
    if not data.license:
        raise ValueError(
            f"{folder / CARD} names no license: add `license:` to its front matter, with license_name and "
            f"license_link if it is other. {why}"
        )
    chosen = License(data.license, data.license_name, data.license_link)
    against = objection(chosen, teachers)
    copies = needs_copy(teachers.values()) if not any(folder.glob("LICENSE*")) else []
    if copies and against is None:
        against = (
            f"{', '.join(dict.fromkeys(copies))} asks for a copy of the agreement with what derives from it, and "
            "there is no LICENSE file with its text"
        )
    if against is None:
        return [f"license: {chosen}. {why}"]
    if not override:
        fix = f"set the license to {proposed}" if proposed and not copies else "follow it"
        raise ValueError(
            f"{against}; {fix}, or say why it does not apply with --license-override REASON, which goes into the card"
        )
    note = f"Published although {against}. The reason given: {override}"
    card.text = replace_block(card.text, "license", f"{license_text(chosen, reasons)}\n\n{note}")
    return [f"license: {chosen}. {note}"]


def _result_files(results: Sequence[Result], repo_id: str) -> Iterable[tuple[str, bytes]]:
    """Result files without the folders of this machine, under names that say what was measured on what."""
    taken: set[str] = set()
    for result in results:
        content = asdict(result)
        content["settings"] = _portable({**result.settings, "model": repo_id})
        content["model"] = repo_id
        assert content.keys() >= IS_RESULT
        stem = "".join(one if one.isalnum() or one in "-." else "-" for one in f"{result.task}.{result.data}")
        name = next(name for n in range(len(results) + 1) if (name := f"{stem}{f'-{n}' if n else ''}") not in taken)
        taken.add(name)
        yield f"{name}.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _portable(value: Any) -> Any:
    """The value with `local:NAME` in the place of every path from the root or the home folder."""
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return f"local:{Path(value).name}"
    return value
