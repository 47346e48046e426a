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
    console.print(table.to_rich())
    text = console.file.getvalue()
    for cell in ("student [tiny]", "CLIP | B", "432×768", "77.19", "FD loss", "–", "batch 8"):
        assert cell in text


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="k-NN of 'a' is nan"):
        Row("a", metrics={"k-NN": float("nan")})
