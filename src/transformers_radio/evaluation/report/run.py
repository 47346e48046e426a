"""`transformers-radio report DIR...`: the results of many evaluations as one table like the paper's Table 1."""

from collections.abc import Sequence
from pathlib import Path

from transformers_radio.disk import write_text
from transformers_radio.evaluation.paths import expand_home
from transformers_radio.evaluation.result import slug

from .collect import read_results
from .model_card import model_index
from .rows import report_table
from .table import Table


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, title: str = "Students and teachers"
) -> tuple[Table, list[Path]]:
    """Write the report of all results in and below the folders; return its table and the files.

    report.md and report.json hold the table (`Table.from_json` reads it), report.png and report.pdf quality against
    throughput (not written unless two models have both), and MODEL.model-index.yaml, one per student, its metrics as
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
    files = [
        write_text(output / "report.md", table.to_markdown()),
        write_text(output / "report.json", table.to_json()),
    ]
    files += quality_throughput_figure(table, students, output / "report.png")
    for student in students:
        results = [one.result for one in measured if one.result.model == student]
        text = model_index(student, results)
        files += [] if text is None else [write_text(output / f"{slug(student)}.model-index.yaml", text)]
    return table, files
