"""`transformers-radio report DIR...`: the results of many evaluations as one table like the paper's Table 1."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from transformers_radio.evaluation.paths import expand_home
from transformers_radio.evaluation.result import Result, slug
from transformers_radio.teachers import TEACHERS

from .table import Row, Table

# Tasks in the order of Table 1's columns; of their metrics those that have a column. Empty: all but those of a
# yes-or-no question that its F1 sums up.
TABLE_METRICS: dict[str, tuple[str, ...]] = {
    "zero-shot": ("Zero-shot",),
    "knn": ("k-NN",),
    "segmentation": ("mIoU",),
    "llava": (),
    "sam-coco": ("SAM COCO", "mask AP"),
}
SUMMED_UP = (" precision", " recall", " yes")
IS_RESULT = {"task", "model", "data", "metrics", "protocol"}  # fields that no other JSON file has together


@dataclass
class Measured:
    """A result, its file, and its task with the method, as the file's name has it ("segmentation-projection")."""

    path: Path
    method: str
    result: Result

    @property
    def spec(self) -> str:
        """Where the model came from, without a title."""
        spec = str(self.result.settings.get("model", self.result.model))
        title, _, source = spec.partition("=")
        return (source if title and source else spec).rstrip("/")


def read_results(folders: Sequence[str | Path]) -> list[Measured]:
    """All the results in and below the folders, in the order of their paths; a file met twice counts once.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no result, or a model was measured twice with other settings: both files are named.
    """
    found: dict[Path, Measured] = {}
    for folder in (Path(expand_home(str(folder))) for folder in folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}; name those that hold results of evaluations.")
        for one in _walk(folder):
            found.setdefault(one.path.resolve(), one)
    if not found:
        raise ValueError(
            f"There are no results in {', '.join(map(str, folders))}: measure with transformers-radio eval."
        )
    kept: dict[tuple[str, str, str], Measured] = {}
    for one in found.values():
        key = (one.result.model, one.method, one.result.data)
        other = kept.setdefault(key, one)
        if other.result != one.result:
            raise ValueError(
                f"{one.result.model} was measured twice on {one.result.data}, with different "
                f"{_differences(other.result, one.result)}: {other.path} and {one.path}. Leave one of them out, or "
                "give the model another title (TITLE=MODEL) where it is another one."
            )
    for one, other in combinations(kept.values(), 2):
        _check_same_model(one, other)
    return list(kept.values())


def report_table(measured: Sequence[Measured], title: str = "Students and teachers") -> tuple[Table, list[str]]:
    """One row a model, teachers before students and each in the order met; and the names of the students.

    A row's resolution is that of its first column in the order of Table 1 (zero-shot, k-NN, ...). Its throughput is
    the one at that resolution, or else the only one there is; of several the one without a decoder. The notes say how
    each column was measured and on how much, which outputs of the models there were to read, what was measured at
    another resolution than the row's, and what has no place in the table.

    Raises:
        ValueError: a model has several throughputs at its resolution, or nothing that was measured has a column.
    """
    by_model: dict[str, list[Measured]] = {}
    for one in measured:
        by_model.setdefault(one.result.model, []).append(one)
    cells = _cells(measured)
    shown = {cell.one.result.model for cell in cells}
    shown |= {one.result.model for one in measured if one.result.task == "throughput"}
    if not shown:
        tasks = ", ".join(dict.fromkeys(one.result.task for one in measured))
        raise ValueError(
            f"There are only results of {tasks}, without a column in the table: measure one of "
            f"{', '.join(TABLE_METRICS)} or throughput."
        )
    rowless = [
        f"Without a row: {model}, measured by {', '.join(one.method for one in by_model.pop(model))} only."
        for model in list(by_model)
        if model not in shown
    ]
    students = [model for model, ones in by_model.items() if not _is_teacher(ones)]
    names = list(dict.fromkeys(cell.column for cell in cells))
    rows, speeds, empty = [], [], []
    for model in sorted(by_model, key=lambda model: model in students):  # stable: teachers first
        own = [cell for cell in cells if cell.one.result.model == model]
        timed = [one for one in by_model[model] if one.result.task == "throughput"]
        first = (own[0].one if own else timed[0]).result
        speed = _throughput(timed, first.resolution)
        if timed and speed is None:
            sides = " and ".join(dict.fromkeys(str(one.result.resolution) for one in timed))
            empty.append(f"Throughput of {model}: measured at {sides} px, none of which is the row's.")
        rows.append(
            Row(
                model,
                first.params,
                tuple(first.resolution) if isinstance(first.resolution, list) else first.resolution,  # type: ignore[arg-type]
                None if speed is None else speed.result.metrics["Throughput"],
                dict.fromkeys(names) | {cell.column: cell.value for cell in own},
            )
        )
        at_theirs = {cell.column: _throughput_at(timed, cell.one.result.resolution) for cell in own}
        rows[-1].speeds = {column: value for column, value in at_theirs.items() if value != rows[-1].throughput}
        speeds += [] if speed is None else [_Cell("Throughput", speed, rows[-1].throughput or 0.0)]
    everything = [*cells, *speeds]
    notes = [*_protocols(everything), *_choices(cells), *_other_resolutions(everything, rows), *empty]
    return Table(title, rows, [*notes, *_left_out(measured), *rowless]), students


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, title: str = "Students and teachers"
) -> tuple[Table, list[Path]]:
    """Write the report of all the results in and below the folders; return its table and the files.

    report.md and report.json hold the table (`Table.from_json` reads it), report.png and report.pdf quality against
    throughput (not written where no two models have both), and MODEL.model-index.yaml, one per student, its metrics as
    a Hub model card's `model-index`.

    Args:
        folders: outputs of `transformers-radio eval`.
        output: where the report goes; None for the first of the folders.

    Raises:
        FileNotFoundError, ValueError: as `read_results` and `report_table`; before anything is written.
    """
    measured = read_results(folders)
    table, students = report_table(measured, title)
    if len({slug(student) for student in students}) < len(students):
        raise ValueError(
            f"Two of {', '.join(students)} would have one file beside the table: give one another title (TITLE=MODEL)."
        )
    from .figure import quality_throughput_figure  # Matplotlib and torch: after what can be wrong with folders

    output = Path(expand_home(str(folders[0] if output is None else output)))
    output.mkdir(parents=True, exist_ok=True)
    files = [_write(output / "report.md", table.to_markdown()), _write(output / "report.json", table.to_json())]
    files += quality_throughput_figure(table, students, output / "report.png")
    for student in students:
        results = [one.result for one in measured if one.result.model == student]
        text = model_index(student, results)
        files += [] if text is None else [_write(output / f"{slug(student)}.model-index.yaml", text)]
    return table, files


def model_index(model: str, results: Sequence[Result]) -> str | None:
    """The `model-index` of a Hub model card as YAML, or None where no result is of a task that the Hub knows."""
    from huggingface_hub import ModelCardData

    entries = [entry for result in results for entry in result.eval_results()]
    return ModelCardData(model_name=model, eval_results=entries).to_yaml() + "\n" if entries else None


@dataclass
class _Cell:
    column: str
    one: Measured
    value: float


def _walk(folder: Path) -> Iterator[Measured]:
    """The results of a folder, then those of the folders in it, but for the work folders beside a result: those may
    hold thousands of files."""
    for root, folders, files in os.walk(folder):
        work = set()
        for name in sorted(files):
            result = _read(Path(root, name)) if name.endswith(".json") else None
            if result is not None:
                work.add(name.removesuffix(".json"))
                yield Measured(Path(root, name), name.partition(".")[0], result)
        folders[:] = sorted(set(folders) - work)


def _read(path: Path) -> Result | None:
    """The result in this file; None for another JSON file, such as one in the folder of a model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): measure again, or remove it.") from error
    return Result.read(path) if isinstance(content, dict) and content.keys() >= IS_RESULT else None


def _check_same_model(one: Measured, other: Measured) -> None:
    """Two results of one name must be of one model: of equal weights where both say so of the same thing."""
    if one.result.model != other.result.model:
        return
    mine, theirs = one.result.settings, other.result.settings
    if "weights" in mine and mine["weights"] == theirs.get("weights"):
        return  # wherever it lay
    # a digest is of the weights in one dtype, and a teacher's position table is of its resolution
    comparable = one.result.resolution == other.result.resolution and "dtype" in mine
    if comparable and mine.get("dtype") == theirs.get("dtype"):
        differ = mine.get("weights") != theirs.get("weights")
    else:
        differ = one.spec != other.spec
    if differ:
        raise ValueError(
            f"{one.path} and {other.path} call different models {one.result.model!r} ({one.spec}, {other.spec}, or "
            "its weights changed in between): give them titles, as TITLE=MODEL, or measure again."
        )


def _differences(one: Result, other: Result) -> str:
    """What differs, settings one by one."""
    keys = [key for key in {**one.settings, **other.settings} if one.settings.get(key) != other.settings.get(key)]
    changed = [f"{key} ({one.settings.get(key)!r}, {other.settings.get(key)!r})" for key in keys]
    fields = [name for name in ("resolution", "counts", "metrics") if getattr(one, name) != getattr(other, name)]
    return ", ".join(changed or fields or ["protocol"])


def _is_teacher(ones: Sequence[Measured]) -> bool:
    typed = any(one.spec.partition(":")[0] in TEACHERS for one in ones)
    # a vision model of transformers is named without a type, but read as a teacher
    return typed or any("teacher's own" in str(one.result.settings.get("features", "")) for one in ones)


def _cells(measured: Sequence[Measured]) -> list[_Cell]:
    """All cells but throughput, column by column in Table 1's order."""
    order = list(TABLE_METRICS)
    ranked = [one for one in measured if one.result.task in TABLE_METRICS]
    ranked.sort(key=lambda one: (order.index(one.result.task), one.method, one.result.data))
    cells = []
    for one in ranked:
        task, data = one.result.task, one.result.data
        sets = {other.result.data for other in ranked if other.method == one.method}
        how = one.method.removeprefix(task).strip("-")
        for metric in _with_column(one.result):
            column = data if task == "segmentation" else metric if len(sets) == 1 else f"{metric} ({data})"
            cells.append(_Cell(f"{column} ({how})" if how else column, one, one.result.metrics[metric]))
    return cells


def _with_column(result: Result) -> list[str]:
    chosen = TABLE_METRICS.get(result.task)
    if chosen is None:
        return []
    return [name for name in result.metrics if (name in chosen if chosen else not name.endswith(SUMMED_UP))]


def _throughput(timed: Sequence[Measured], resolution: int | list[int] | None) -> Measured | None:
    """The one for the row; None where there is none, or several and none at the row's resolution.

    What was timed with windows of its own is left out: the quality beside it was measured without them.
    """
    timed = [one for one in timed if not one.result.settings.get("window_size")]
    fitting = [one for one in timed if one.result.resolution == resolution] or timed
    # all have the model alone, but beside a decoder it was timed in other company
    fitting = [one for one in fitting if one.result.settings.get("decoder", "none") == "none"] or fitting
    if len(fitting) > 1:
        if fitting[0].result.resolution != resolution:
            return None
        raise ValueError(
            f"{fitting[0].result.model} has the throughputs of {' and '.join(str(one.path) for one in fitting)}, and "
            f"its row, at {resolution} px, has room for one: leave the others out of the folders."
        )
    return fitting[0] if fitting else None


def _throughput_at(timed: Sequence[Measured], resolution: int | list[int] | None) -> float | None:
    """Images/s of the model alone at just this resolution; None where there is no such figure, or more than one."""
    fitting = [one for one in timed if one.result.resolution == resolution]
    fitting = [one for one in fitting if one.result.settings.get("decoder", "none") == "none"] or fitting
    return fitting[0].result.metrics["Throughput"] if len(fitting) == 1 else None


def _protocols(cells: Sequence[_Cell]) -> list[str]:
    """A note for each way of measuring, with its columns and, where not all models were measured so, its models."""
    groups: dict[tuple[str, str], list[_Cell]] = {}
    for cell in cells:
        result = cell.one.result
        seed = [] if result.seed is None else [f"seed {result.seed}"]
        # the rounds of a throughput are in its protocol
        counts = {} if result.task == "throughput" else result.counts
        numbers = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
        how = "; ".join([result.protocol, *seed, *([", ".join(numbers)] if numbers else [])])
        groups.setdefault((result.data, how), []).append(cell)
    notes = []
    for (data, how), group in groups.items():
        columns = list(dict.fromkeys(cell.column for cell in group))
        models = list(dict.fromkeys(cell.one.result.model for cell in group))
        everyone = {cell.one.result.model for cell in cells if cell.column in columns}
        whose = "" if everyone == set(models) else f" ({', '.join(models)})"
        notes.append(f"{', '.join(columns)}{whose}: {data}; {how}.")
    return notes


def _choices(cells: Sequence[_Cell]) -> list[str]:
    """A note for each model that has outputs to choose from."""
    read: dict[str, dict[str, None]] = {}
    for cell in cells:
        if "summary" in cell.one.result.choices:
            texts = read.setdefault(cell.one.result.model, {})
            texts.update({f"{key}: {choice}": None for key, choice in cell.one.result.choices.items()})
    return [f"Outputs of {model}: {'; '.join(texts)}." for model, texts in read.items()]


def _other_resolutions(cells: Sequence[_Cell], rows: Sequence[Row]) -> list[str]:
    resolutions = {row.model: row.resolution for row in rows}
    others = []
    for cell in cells:
        own = cell.one.result.resolution
        if (tuple(own) if isinstance(own, list) else own) != resolutions[cell.one.result.model]:
            others.append(f"{cell.column} of {cell.one.result.model} at {own} px")
    return [f"Not at the row's resolution: {', '.join(others)}."] if others else []


def _left_out(measured: Sequence[Measured]) -> list[str]:
    names: dict[str, None] = {}
    for one in measured:
        if one.result.task not in TABLE_METRICS and one.result.task != "throughput":
            names[one.result.task] = None
        for metric in one.result.metrics:
            if one.result.task in TABLE_METRICS and metric not in _with_column(one.result):
                names[f"{one.method} {metric}"] = None
    return [f"In the result files only: {', '.join(names)}."] if names else []


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
