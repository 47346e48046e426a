"""The table, read back as a reader would: Markdown cells, JSON values, terminal text."""

import io
import json

import pytest
from rich.console import Console

from transformers_radio.evaluation import Row, Table


@pytest.fixture
def table() -> Table:
    return Table(
        "Quickstart",
        [
            Row("CLIP | B", 632_000_000, 224, 503.4, {"Zero-shot": 77.19, "k-NN": 81.104}),
            Row("student [tiny]", 1_260_000, (432, 768), 12.34, {"Zero-shot": 74.0, "k-NN": 81.1, "FD loss": 0.3}),
            Row("SAM", metrics={"Zero-shot": None, "FD loss": 0.25}),
        ],
        notes=["batch 8"],
        lower_is_better=["FD loss"],
    )


def test_markdown_has_the_columns_dashes_and_the_best_in_bold(table):
    assert table.to_markdown() == (
        "### Quickstart\n\n"
        "| Model | Params (M) | Resolution | Throughput | Zero-shot | k-NN | FD loss |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| CLIP \\| B | 632 | 224 | **503** | **77.19** | **81.10** | – |\n"
        "| student [tiny] | 1.3 | 432×768 | 12.3 | 74.00 | **81.10** | 0.30 |\n"
        "| SAM | – | – | – | – | – | **0.25** |\n\n"
        "- batch 8\n"
    )


def test_a_lone_value_is_not_called_best():
    assert "**" not in Table("One", [Row("a", throughput=3.0, metrics={"k-NN": 5.0}), Row("b")]).to_markdown()


def test_json_keeps_full_precision_and_missing_values(table):
    loaded = json.loads(table.to_json())
    assert loaded["title"] == "Quickstart" and loaded["notes"] == ["batch 8"]
    assert loaded["rows"][0]["params"] == 632_000_000 and loaded["rows"][0]["metrics"]["k-NN"] == 81.104
    assert loaded["rows"][1]["resolution"] == [432, 768]
    assert loaded["rows"][2]["throughput"] is None and loaded["rows"][2]["metrics"]["Zero-shot"] is None


def test_json_reads_back_as_the_same_table(table):
    assert Table.from_json(table.to_json()) == table


def test_terminal_shows_every_cell_and_treats_brackets_as_text(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table.to_rich(console.width))
    text = console.file.getvalue()
    for cell in ("student [tiny]", "CLIP | B", "432×768", "77.19", "FD loss", "–", "batch 8"):
        assert cell in text


PAPER = ["Zero-shot", "k-NN", "ADE20k", "VOC", "GQA", "TextVQA", "VQAv2", "POPE F1", "SAM COCO"]  # Table 1


@pytest.mark.parametrize("width", [80, 50, 30])
@pytest.mark.parametrize("metrics", [["Zero-shot", "k-NN", "mIoU", "Masks"], PAPER], ids=["quickstart", "paper"])
def test_a_narrow_terminal_cuts_neither_headings_nor_cells(metrics, width):
    names = ["DFN CLIP-H/14", "RADIO student", "runs-mine-student-of-a-name-longer-than-any-narrow-terminal"]
    rows = [
        Row(name, 632_000_000, (432, 768), 1556.25, {metric: 10 + number for number, metric in enumerate(metrics)})
        for name in names
    ]
    table = Table("Students and teachers", rows, ["a note"])
    console = Console(file=io.StringIO(), width=width)
    console.print(table.to_rich(width))
    lines = console.file.getvalue().splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in text and "a note" in text
    words = [word for line in lines for word in line.split()]
    values = [f"{value:.2f}" for value in rows[0].metrics.values()]
    for column, value in zip(table.columns, ["", "632", "432×768", "1556", *values], strict=True):
        assert set(column.split()) <= set(words)
        assert not value or words.count(value) == len(rows)
    assert names[2] in "".join(line.split()[0] for line in lines if line[:1].strip())  # folded
    if width == 80 and metrics != PAPER:
        assert text.count("Model") == 1  # in a single table


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="k-NN of 'a' is nan"):
        Row("a", metrics={"k-NN": float("nan")})
