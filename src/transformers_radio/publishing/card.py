"""Model cards of students: what `eval` has measured, and a card for a folder that has none.

    python -m transformers_radio.publishing.card FOLDER [RESULTS ...]

writes FOLDER/README.md where there is none, and puts the results of this student below RESULTS into it. Training
renders the card (training/run/card.py); everything in it but the evaluation is its author's from then on.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from transformers_radio.data import USER_ERRORS, one_line
from transformers_radio.disk import write_text
from transformers_radio.evaluation.models.encoder import load_student
from transformers_radio.evaluation.report.collect import read_results
from transformers_radio.evaluation.report.model_card import eval_results
from transformers_radio.evaluation.result import Result
from transformers_radio.modeling import student_class
from transformers_radio.teachers import digest_weights
from transformers_radio.training.recipe import load_recipe
from transformers_radio.training.run.card import CARD, RECIPE, TEACHERS, find_block, replace_block, student_card

logger = logging.getLogger(__name__)


def read_card(folder: Path) -> ModelCard:
    """The folder's README.md as a model card.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its front matter is damaged.
    """
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CARD}: `python -m transformers_radio.publishing.card {folder}` writes one from what "
            "the folder says of itself"
        )
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of the YAML parser, or of the metadata's own checks
        raise ValueError(f"{path} is damaged ({one_line(error)}): correct its front matter") from error


def describe_folder(folder: Path) -> ModelCard:
    """A card for a student's folder: from its configuration, and from recipe.yaml and teacher_manifest.json if there.

    Raises:
        OSError, ValueError: there is no student, or one of these files is damaged.
    """
    student = empty_student(folder)
    # it is only described: no teacher is built
    recipe = load_recipe(folder / RECIPE, trust_code=True) if (folder / RECIPE).is_file() else None
    return student_card(student, recipe, read_manifest(folder), title=folder.resolve().name)


def write_described_card(folder: Path) -> Path:
    """Writes the folder's README.md anew, see `describe_folder`."""
    return write_text(folder / CARD, str(describe_folder(folder)))


def empty_student(folder: Path) -> Any:
    """The student of a folder on the meta device: shapes and no values.

    Raises:
        OSError, ValueError: the folder holds no student, or a damaged configuration.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no config.json: name the folder of a trained student") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error})") from error
    found = student_class(config.get("model_type"))
    with torch.device("meta"):
        return found(found.config_class.from_pretrained(folder))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """teacher_manifest.json of a student's folder; empty where there is none."""
    path = folder / TEACHERS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): bring it back from the run, or remove it") from error


def results_of(folder: Path, sources: Sequence[Path]) -> list[Result]:
    """The results below `sources` that were measured with the weights in this student's folder.

    Other models' results, and those of earlier weights of this student, are left out.

    Raises:
        FileNotFoundError, ValueError: as `read_results`.
    """

    @cache
    def weights(dtype: str) -> str:
        return digest_weights(load_student(str(folder), dtype))

    def is_ours(result: Result) -> bool:
        if result.kind == "teacher":
            return False
        if result.task == "sam-coco":  # whose digest is of the encoder in SAM's place
            return Path(result.spec).resolve() == folder.resolve()
        return result.settings.get("weights") == weights(str(result.settings.get("dtype", "float32")))

    return [one.result for one in read_results(sources) if is_ours(one.result)]


def add_results(card: ModelCard, results: Sequence[Result]) -> None:
    """Puts results into a card: between the marks of its evaluation, and as `model-index` into its metadata."""
    lines = ["| task | data | resolution | metric | value |", "|---|---|---:|---|---:|"]
    for result in results:
        lines += [
            f"| {result.task} | {result.data} | {_side(result.resolution)} | {name} | {value:.2f} |"
            for name, value in result.metrics.items()
        ]
    notes = dict.fromkeys(f"- {result.task} on {result.data}: {result.protocol}" for result in results)
    entries = [entry for result in results for entry in eval_results(result)]
    add_evaluation(card, "\n".join([*lines, "", *notes]), entries, results[0].model)


def add_evaluation(card: ModelCard, text: str, entries: list[EvalResult], model: str) -> None:
    """Puts a text and the `model-index` into a card, in the place of what an earlier call has put there."""
    data: Any = card.data
    card.text = replace_block(card.text, "evaluation", text)
    data.model_name, data.eval_results = model, entries or None


def update_card(folder: Path, sources: Sequence[Path]) -> None:
    """After an evaluation: adds its results to the card of the student, if its folder has one.

    A card that cannot be updated is no reason to fail: a warning says why.
    """
    if not (folder / CARD).is_file():
        return
    try:
        card = read_card(folder)
        results = results_of(folder, sources)
        if results:
            before = _rows(card)
            add_results(card, results)
            write_text(folder / CARD, str(card))
            _warn_of_rows_gone(folder, sources, before - _rows(card))
    except (OSError, ValueError) as error:
        logger.warning("%s is not updated: %s", folder / CARD, one_line(error))


def _rows(card: ModelCard) -> set[str]:
    """The lines of the tables in a card's evaluation."""
    return {line for line in find_block(card.text, "evaluation").splitlines() if line.startswith("| ")}


def _warn_of_rows_gone(folder: Path, sources: Sequence[Path], rows: set[str]) -> None:
    if rows:
        where = " ".join(map(str, sources))
        logger.warning(
            "%s now shows what is in %s; %d lines that it showed before are not, such as %s. To show the results of "
            "several folders: python -m transformers_radio.publishing.card %s %s OTHER ...",
            folder / CARD,
            where,
            len(rows),
            min(rows),
            folder,
            where,
        )


def _side(resolution: int | list[int] | None) -> str:
    if isinstance(resolution, list):
        return "x".join(map(str, resolution))
    return "–" if resolution is None else str(resolution)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="A student's folder.")
    parser.add_argument("results", type=Path, nargs="*", help="Folders of results, such as runs/eval.")
    options = parser.parse_args(arguments)
    has_card = (options.folder / CARD).is_file()
    if has_card and not options.results:
        raise ValueError(f"{options.folder / CARD} is there already: name results to add, or remove it to start anew")
    card = read_card(options.folder) if has_card else describe_folder(options.folder)
    if options.results:
        results = results_of(options.folder, options.results)
        if not results:
            raise ValueError(f"there are no results of {options.folder} in {', '.join(map(str, options.results))}")
        add_results(card, results)
    print(write_text(options.folder / CARD, str(card)))


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from error
