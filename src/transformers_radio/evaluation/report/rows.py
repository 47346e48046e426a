"""Results as rows of the report's table, and the notes that say how each column was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import TASKS, load_task

from .collect import Found
from .table import Row, Table


@dataclass
class _Cell:
    """One value of the table, its column, and where it was found."""

    column: str
    metric: str
    value: float
    one: Found


def report_table(measured: Sequence[Found], title: str = "Students and teachers") -> tuple[Table, list[str]]:
    """One row per model, teachers before students and each in the order met; and the names of the students.

    A row's resolution is that of its first column in the order of Table 1 (zero-shot, k-NN, ...). Its throughput is
    the one at that resolution, or else the only one there is; if there are several, the one without a decoder. The
    notes say how each column was measured and on how much, which outputs of the models there were to read, what was
    measured at another resolution than the row's, and what has no place in the table.

    Raises:
        ValueError: a model has several throughputs at its resolution, or nothing that was measured has a column.
    """
    by_model: dict[str, list[Found]] = {}
    for one in measured:
        by_model.setdefault(one.result.model, []).append(one)
    cells = _cells(measured)
    shown = {cell.one.result.model for cell in cells}
    shown |= {one.result.model for one in measured if one.result.task == "throughput"}
    if not shown:
        tasks = ", ".join(dict.fromkeys(one.result.task for one in measured))
        raise ValueError(
            f"There are only results of {tasks}, without a column in the table: measure one of "
            f"{', '.join(name for name in TASKS if load_task(name).columns)} or throughput."
        )
    without_row = [
        f"Without a row: {model}, measured by {', '.join(one.method for one in by_model.pop(model))} only."
        for model in list(by_model)
        if model not in shown
    ]
    students = [model for model, ones in by_model.items() if all(one.result.kind != "teacher" for one in ones)]
    columns = [cell.column for cell in cells]
    rows, speeds, not_timed = [], [], []
    for model in sorted(by_model, key=lambda model: model in students):  # stable: teachers first
        own = [cell for cell in cells if cell.one.result.model == model]
        timed = [one for one in by_model[model] if one.result.task == "throughput"]
        first = (own[0].one if own else timed[0]).result
        speed = _throughput(timed, first.resolution)
        if speed is not None:
            speeds.append(_Cell("Throughput", "Throughput", speed.result.metrics["Throughput"], speed))
        elif timed:
            sides = " and ".join(dict.fromkeys(str(one.result.resolution) for one in timed))
            not_timed.append(f"Throughput of {model}: measured at {sides} px, none of which is the row's.")
        rows.append(_row(first, own, speed, timed, columns))
    everything = [*cells, *speeds]
    notes = [*_protocols(everything), *_choices(cells), *_other_resolutions(everything, rows), *not_timed]
    units: dict[str, str] = {}
    lower_is_better = []
    for cell in cells:
        task = load_task(cell.one.result.task)
        if cell.metric in task.units:
            units[cell.column] = task.units[cell.metric]
        if cell.metric in task.lower_is_better and cell.column not in lower_is_better:
            lower_is_better.append(cell.column)
    table = Table(title, rows, [*notes, *_left_out(measured), *without_row], lower_is_better, units)
    return table, students


def _row(
    first: Result, cells: Sequence[_Cell], speed: Found | None, timed: Sequence[Found], columns: Sequence[str]
) -> Row:
    """The row of a model, with the resolution of its result `first`; None in columns that it has no cell of."""
    throughput = None if speed is None else speed.result.metrics["Throughput"]
    side = tuple(first.resolution) if isinstance(first.resolution, list) else first.resolution
    speeds = {cell.column: _throughput_at(timed, cell.one.result.resolution) for cell in cells}
    return Row(
        first.model,
        first.params,
        side,  # type: ignore[arg-type]
        throughput,
        dict.fromkeys(columns) | {cell.column: cell.value for cell in cells},
        {column: value for column, value in speeds.items() if value != throughput},
    )


def _cells(measured: Sequence[Found]) -> list[_Cell]:
    """All cells but throughput, column by column in the order of `TASKS`."""
    order = list(TASKS)
    ranked = [one for one in measured if _columns(one.result)]
    ranked.sort(key=lambda one: (order.index(one.result.task), one.method, one.result.data))
    cells = []
    for one in ranked:
        task, data = one.result.task, one.result.data
        sets = {other.result.data for other in ranked if other.method == one.method}
        how = one.method.removeprefix(task).strip("-")
        for metric in _columns(one.result):
            column = metric if len(sets) == 1 else f"{metric} ({data})"
            column = data if load_task(task).column_is_data else column
            cells.append(_Cell(f"{column} ({how})" if how else column, metric, one.result.metrics[metric], one))
    return cells


def _columns(result: Result) -> list[str]:
    """The metrics of this result that have a column; none if there is no such task any more."""
    if result.task not in TASKS:
        return []
    task = load_task(result.task)
    return [metric for metric in result.metrics if task.has_column(metric)]


def _throughput(timed: Sequence[Found], resolution: int | list[int] | None) -> Found | None:
    """The one for the row; None if there is none, or several and none at the row's resolution.

    What was timed with windows of its own is left out: the quality beside it was measured without them.
    """
    timed = [one for one in timed if not one.result.settings.get("window_size")]
    fitting = [one for one in timed if one.result.resolution == resolution] or timed
    # all have timed the model alone, but with a decoder there were more models in turn
    fitting = [one for one in fitting if one.result.settings.get("decoder", "none") == "none"] or fitting
    if len(fitting) > 1:
        if fitting[0].result.resolution != resolution:
            return None
        raise ValueError(
            f"{fitting[0].result.model} has the throughputs of {' and '.join(str(one.path) for one in fitting)}, and "
            f"its row, at {resolution} px, has room for one: leave the others out of the folders."
        )
    return fitting[0] if fitting else None


def _throughput_at(timed: Sequence[Found], resolution: int | list[int] | None) -> float | None:
    """Images/s of the model alone at exactly this resolution; None if there is no such number, or more than one."""
    fitting = [one for one in timed if one.result.resolution == resolution]
    fitting = [one for one in fitting if one.result.settings.get("decoder", "none") == "none"] or fitting
    return fitting[0].result.metrics["Throughput"] if len(fitting) == 1 else None


def _protocols(cells: Sequence[_Cell]) -> list[str]:
    """A note for each way of measuring, with its columns and, if not all models were measured so, its models."""
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


def _left_out(measured: Sequence[Found]) -> list[str]:
    """A note on the tasks without columns, and on the other metrics of those that have some."""
    names: dict[str, None] = {}
    for one in measured:
        columns, task = _columns(one.result), one.result.task
        if columns:
            names |= {f"{one.method} {metric}": None for metric in one.result.metrics if metric not in columns}
        elif task != "throughput":
            names[task] = None
    return [f"In the result files only: {', '.join(names)}."] if names else []
