"""A new task needs one line in `TASKS`: settings, help, results that are kept, a column, and a model card's entry."""

import pytest
import yaml
from typer.testing import CliRunner

from helpers.tiny_sam import make_student
from helpers.toy_task import Toy
from transformers_radio.cli import app
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.report.collect import read_results
from transformers_radio.evaluation.report.model_card import eval_results
from transformers_radio.evaluation.report.rows import report_table
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import TASKS, run_task


@pytest.fixture(autouse=True)
def line(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", "helpers.toy_task:Toy")


@pytest.fixture
def student(tmp_path):
    make_student().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def measured(monkeypatch):
    """The models that were measured."""
    names = []
    measure = Toy.measure
    monkeypatch.setattr(
        Toy, "measure", lambda self, job, folder: names.append(job.model) or measure(self, job, folder)
    )
    return names


def command(*arguments):
    run = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})
    return run.output if run.exit_code == 0 else str(run.exception)


def test_a_finished_result_is_not_measured_again_whatever_does_not_count(student, tmp_path, measured):
    run = lambda *overrides: run_task("toy", [f"a={student}"], output=tmp_path / "out", overrides=list(overrides))  # noqa: E731
    (result,) = run()
    expected = load_encoder(str(student))
    assert (result.model, result.data, result.kind) == ("a", "gray", "student")
    assert (result.params, result.resolution) == (expected.params, expected.image_size)
    assert Result.read(tmp_path / "out" / "a" / "toy.gray.json") == result
    assert run() == run("note=other words") == [result]
    assert measured == ["a"]
    with pytest.raises(ValueError, match=r"other settings; it differs in images \(2 there, 3 here\)"):
        run("images=3")
    (other,) = run("images=3", "overwrite=true")
    assert other.counts == {"images": 3} and measured == ["a", "a"]
    run_task("toy", [f"a={student}", f"b={student}"], output=tmp_path / "out", overrides=["images=3"])
    assert measured == ["a", "a", "b"]


def test_its_units_and_direction_reach_the_table(student, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "units", {"Mean": "px"})
    monkeypatch.setattr(Toy, "lower_is_better", ("Mean",))
    run_task("toy", [f"a={student}"], output=tmp_path / "out")
    table, _ = report_table(read_results([tmp_path / "out"]))
    assert table.units == {"Mean": "px"} and table.lower_is_better == ["Mean"]


def test_the_command_line_knows_it(student, tmp_path, measured):
    arguments = ("eval", "toy", "--model", f"a={student}", "--output", tmp_path / "out")
    for _ in range(2):
        assert "a  Mean -0." in command(*arguments) or "a  Mean 0." in command(*arguments)
    assert measured == ["a"]
    assert "The settings are images, note, overwrite." in command(*arguments, "k=3")
    assert "images is 0; expected at least 1." in command(*arguments, "images=0")
    assert "features, toy." in command("eval", "--help")
    printed = command("eval", "toy", "--help")
    assert "images: int = 2\n    How many images are made.\n" in printed
    assert "Settings of knn" not in printed and "Settings of toy" in printed


def test_the_report_and_the_model_card_have_it(student, tmp_path):
    run_task("toy", [f"a={student}"], output=tmp_path)
    result = Result.read(tmp_path / "a" / "toy.gray.json")
    printed = command("report", tmp_path)
    assert "Mean" in printed and "In the result files only: toy Twice the mean." in printed.replace("\n", " ")
    report = (tmp_path / "report.md").read_text()
    assert "| Model | Params (M) | Resolution | Throughput | Mean |" in report and "gray images; 2 images" in report
    (index,) = yaml.safe_load((tmp_path / "a.model-index.yaml").read_text())["model-index"]
    (entry,) = index["results"]
    assert entry["task"]["type"] == "image-feature-extraction" and entry["dataset"]["name"] == "gray"
    assert [metric["type"] for metric in entry["metrics"]] == ["mean", "accuracy"]
    assert [one.metric_value for one in eval_results(result)] == list(result.metrics.values())


def test_without_its_line_a_result_has_no_column_and_no_entry(student, tmp_path, monkeypatch):
    (result,) = run_task("toy", [f"a={student}"], output=tmp_path)
    monkeypatch.delitem(TASKS, "toy")
    assert eval_results(result) == []
    assert "only results of toy, without a column" in command("report", tmp_path)
    assert "There is no task 'toy'" in command("eval", "toy", "--model", student)
