"""Cards: those in hub_cards/, those of folders without one, and what evaluation adds."""

import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from helpers.nvidia_files import make, write_hub
from helpers.paths import ROOT
from helpers.published_student import make_student
from transformers_radio.cli import main as command
from transformers_radio.evaluation.result import Result
from transformers_radio.hub import nvidia_checkpoint
from transformers_radio.publishing import publish
from transformers_radio.publishing.card import main, update_card
from transformers_radio.publishing.publish import prepare
from transformers_radio.teachers import digest_weights

CARDS = sorted((ROOT / "hub_cards").glob("*.md"))


def test_the_cards_are_up_to_date():
    command = [sys.executable, str(ROOT / "hub_cards/render.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_have_their_metadata_and_the_untrained_no_figures(path):
    card = ModelCard.load(path)
    data = card.data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-feature-extraction"
    assert data.license and data.datasets and "radio" in data.tags
    if path.stem == "quickstart":
        row = next(
            line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| RADIO student")
        )
        figures = [float(cell.strip(" *")) for cell in row.strip("|").split("|")[4:]]
        assert len(figures) == 4 and [entry.metric_value for entry in data.eval_results] == figures
        assert (path.parent / "../docs/quickstart.png").is_file() and "(../docs/quickstart.png)" in card.text
    else:
        assert data.base_model and data.eval_results is None
        assert "**Not trained.**" in card.text and "Not trained, so nothing was measured." in card.text
    assert len(CARDS) == 7


def result(model, task, value, weights=None):
    settings = {"weights": weights or digest_weights(model), "dtype": "float32", "model": "x"}
    return Result(task, "x", "Tiny set", {task: value}, "some protocol", settings, resolution=64, kind="student")


def test_evaluation_adds_its_results_and_leaves_the_rest_of_the_card(tmp_path):
    folder, card = tmp_path / "student", tmp_path / "student/README.md"
    model = make_student(folder)
    card.write_text(card.read_text().replace("## License", "## Mine\n\nwritten by hand\n\n## License"))
    before = card.read_text()
    result(model, "knn", 81.5).write(tmp_path / "eval/knn.json")
    result(model, "zero-shot", 12.5, "others").write(tmp_path / "eval/other/zero-shot.json")
    with pytest.MonkeyPatch.context() as patch:  # another model's, so the names differ
        patch.setattr("transformers_radio.evaluation.report.collect._check_same_model", lambda one, other: None)
        update_card(folder, [tmp_path / "eval"])
    after = card.read_text()
    assert "| knn | Tiny set | 64 | knn | 81.50 |" in after and "12.50" not in after
    assert before.partition("## Evaluation")[0].partition("---\n\n")[2] in after and "written by hand" in after
    assert ModelCard(after).data.eval_results[0].metric_value == 81.5
    (tmp_path / "eval/other/zero-shot.json").unlink()
    result(model, "knn", 82.5).write(tmp_path / "eval/knn.json")
    update_card(folder, [tmp_path / "eval"])
    assert "82.50" in card.read_text() and "81.50" not in card.read_text()


def test_what_an_evaluation_takes_out_of_a_card_is_named(tmp_path, caplog):
    model = make_student(tmp_path / "student")
    result(model, "knn", 81.5).write(tmp_path / "eval/knn.json")
    update_card(tmp_path / "student", [tmp_path / "eval"])
    result(model, "zero-shot", 12.5).write(tmp_path / "eval/zero-shot.json")
    update_card(tmp_path / "student", [tmp_path / "eval"])
    assert not caplog.records  # nothing is gone
    result(model, "knn", 70.5).write(tmp_path / "trial/knn.json")
    update_card(tmp_path / "student", [tmp_path / "trial"])
    [record] = caplog.records
    assert "2 lines that it showed before are not, such as | knn | Tiny set | 64 | knn | 81.50 |" in record.message
    main([str(tmp_path / "student"), str(tmp_path / "eval")])  # as the message says
    card = (tmp_path / "student/README.md").read_text()
    assert "81.50" in card and "12.50" in card and "70.50" not in card


def test_an_evaluation_does_not_fail_for_a_card(tmp_path, caplog):
    make_student(tmp_path / "student")
    (tmp_path / "student/README.md").write_text("---\nlicense: [\n---\n")
    update_card(tmp_path / "student", [tmp_path])
    assert "is not updated" in caplog.text
    update_card(tmp_path / "nowhere", [tmp_path])


def test_a_folder_without_a_card_gets_one(tmp_path):
    folder = tmp_path / "student"
    make_student(folder)
    written = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="is there already"):
        main([str(folder)])
    (folder / "README.md").unlink()
    main([str(folder)])
    assert (folder / "README.md").read_text() == written.replace("# tiny\n", "# student\n")
    for name in ("README.md", "recipe.yaml", "teacher_manifest.json"):
        (folder / name).unlink()
    main([str(folder)])  # from the configuration alone
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None and "| `sam` | – | 6 |" in card.text
    with pytest.raises(FileNotFoundError, match="no config.json"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("version", "license", "needs_copy"),
    [("c-radio_v3-b", "nvidia-open-model-license", True), ("radio_v2.5-b", "nsclv1", False)],
)
def test_a_converted_release_gets_a_card_that_may_be_published(version, license, needs_copy, tmp_path, monkeypatch):
    args, stored, *_ = make(version, "hub")
    monkeypatch.chdir(tmp_path)
    write_hub(tmp_path / "files", args, stored, version)
    monkeypatch.setattr(nvidia_checkpoint, "_download", lambda source: tmp_path / "files")
    monkeypatch.setattr("sys.argv", ["transformers-radio", "convert", "nvidia/Some-RADIO", "student"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert not ended.value.code
    card = ModelCard.load("student/README.md")
    assert (card.data.license, card.data.license_name) == ("other", license)
    assert card.data.base_model == ["nvidia/Some-RADIO"]
    assert card.data.license_link and card.data.pipeline_tag == "image-feature-extraction"
    assert "The weights of `nvidia/Some-RADIO`, converted" in card.text and "distilled from" not in card.text
    assert "conversion does not change their license" in card.text and "<!-- evaluation -->" in card.text
    with pytest.raises(ValueError, match="names no data"):  # which NVIDIA's files do not say
        prepare(tmp_path / "student", "someone/radio")
    card.data.datasets = ["someone/images"]
    card.save("student/README.md")
    monkeypatch.setattr(publish, "check_loaders", lambda folder: [])
    if needs_copy:
        with pytest.raises(ValueError, match=f"{license} asks for a copy of the agreement"):
            prepare(tmp_path / "student", "someone/radio")
        (tmp_path / "student/LICENSE").write_text("its text")
    published = prepare(tmp_path / "student", "someone/radio")
    assert published.card.data.license_name == license and "model.safetensors" in published.files
