"""Result files as one table: against the table written out by hand, and the Hub's own reader of model cards."""

import json
from importlib import resources

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from transformers_radio.evaluation.report.collect import read_results
from transformers_radio.evaluation.report.rows import report_table
from transformers_radio.evaluation.report.run import write_report
from transformers_radio.evaluation.report.table import Table
from transformers_radio.evaluation.result import Result, result_path
from transformers_radio.evaluation.run import run_task
from transformers_radio.modeling import RadioConfig, RadioModel

CLIP, STUDENT = {"model": "open_clip:clip", "dtype": "float32"}, {"model": "runs/mine", "dtype": "float32"}
KNN, SPEED = "k = 20", "batch 8, float32, cpu"


def save(folder, task, model, data, metrics, resolution, settings, protocol=KNN, params=None, method=None):
    settings = {"weights": f"{settings['model']} {settings.get('dtype')}", **settings}
    result = Result(task, model, data, metrics, protocol, settings, {"images": 9}, params, resolution)
    path = result_path(folder, model, method or task, data)
    result.write(path)
    return path


def save_all(folder):
    """A student measured before its teachers, one of whose results is in a second folder."""
    mine, clip = ("mine", "Tiny set"), ("CLIP", "Tiny set")
    save(folder, "knn", *mine, {"k-NN": 81.104}, 64, STUDENT, params=1_260_000)
    save(folder, "zero-shot", *mine, {"Zero-shot": 74.0}, 64, STUDENT, "3 templates", 1_260_000)
    for side, speed in ((64, 12.34), (128, 3.0)):
        speeds = {"Throughput": speed, "ms, batch 8": 5.0}
        save(folder, "throughput", "mine", f"{side}x{side}", speeds, side, STUDENT, f"{SPEED}, {side} px", 1_260_000)
    save(folder, "knn", *clip, {"k-NN": 81.1}, 224, CLIP, params=632_000_000)
    save(folder, "zero-shot", *clip, {"Zero-shot": 77.19}, 224, CLIP, "3 templates", 632_000_000)
    save(folder / "more", "throughput", "CLIP", "224x224", {"Throughput": 503.4}, 224, CLIP, f"{SPEED}, 224 px")
    scores = {"mIoU": 40.25, "aAcc": 70.0}
    save(folder, "segmentation", "CLIP", "ADE20K", scores, 512, CLIP, "linear probe")
    words = {"mIoU": 9.5, "aAcc": 30.0}
    save(folder, "segmentation", "mine", "ADE20K", words, 512, STUDENT, "by words", method="segmentation-summary_head")
    save(folder, "llava", "mine", "LLaVA-1.5", {"GQA": 60.0, "POPE F1": 80.0, "POPE yes": 51.0}, 64, STUDENT, "greedy")
    sam = {"model": "SAM=segment_anything:sam.pth"}  # as that task writes it: without a dtype, with the title
    save(folder, "sam-coco", "SAM", "COCO", {"SAM COCO": 77.18, "mask small": 60.0}, [64, 128], sam, "true boxes", 5)
    save(folder, "resolution", "mine", "Tiny set", {"k-NN @ 64": 81.1, "k-NN @ 128": 80.0}, 64, STUDENT)


def test_the_table_has_one_row_a_model_in_the_order_of_table_1(tmp_path):
    save_all(tmp_path)
    table, students = report_table(read_results([tmp_path, tmp_path / "more"]), "All")
    assert students == ["mine"]
    assert table.to_markdown() == (
        "### All\n\n"
        "| Model | Params (M) | Resolution | Throughput | Zero-shot | k-NN | ADE20K | ADE20K (summary_head) | GQA | "
        "POPE F1 | SAM COCO |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| CLIP | 632 | 224 | **503** | **77.19** | **81.10** | 40.25 | – | – | – | – |\n"
        "| SAM | 0.0 | 64×128 | – | – | – | – | – | – | – | 77.18 |\n"
        "| mine | 1.3 | 64 | 12.3 | 74.00 | **81.10** | – | 9.50 | 60.00 | 80.00 | – |\n\n"
        "- Zero-shot: Tiny set; 3 templates; 9 images.\n"
        "- k-NN: Tiny set; k = 20; 9 images.\n"
        "- ADE20K: ADE20K; linear probe; 9 images.\n"
        "- ADE20K (summary_head): ADE20K; by words; 9 images.\n"
        "- GQA, POPE F1: LLaVA-1.5; greedy; 9 images.\n"
        "- SAM COCO: COCO; true boxes; 9 images.\n"
        "- Throughput (CLIP): 224x224; batch 8, float32, cpu, 224 px.\n"
        "- Throughput (mine): 64x64; batch 8, float32, cpu, 64 px.\n"
        "- Not at the row's resolution: ADE20K of CLIP at 512 px, ADE20K (summary_head) of mine at 512 px.\n"
        "- In the result files only: segmentation aAcc, sam-coco mask small, llava POPE yes, resolution, "
        "segmentation-summary_head aAcc.\n"
    )


def test_two_sets_of_one_task_have_a_column_each(tmp_path):
    save(tmp_path, "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    save(tmp_path, "knn", "CLIP", "cars", {"k-NN": 60.0}, 224, CLIP)
    table, _ = report_table(read_results([tmp_path]))
    assert table.rows[0].metrics == {"k-NN (birds)": 50.0, "k-NN (cars)": 60.0}


def test_files_of_other_kinds_are_passed_over_and_damaged_ones_named(tmp_path):
    path = save(tmp_path, "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    (tmp_path / "CLIP" / "config.json").write_text('{"model_type": "radio", "task": 3}')
    (tmp_path / "CLIP" / "list.json").write_text("[1, 2]")
    (one,) = read_results([tmp_path])
    assert one.path == path and one.result == Result.read(path)
    (tmp_path / "CLIP" / "knn.birds").mkdir()  # the work folder of the result
    (tmp_path / "CLIP" / "knn.birds" / "00000.json").write_text("{")
    assert len(read_results([tmp_path])) == 1
    (tmp_path / "CLIP" / "cut.json").write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"cut\.json is damaged"):
        read_results([tmp_path])


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no results in .*measure with transformers-radio eval"):
        read_results([tmp_path])
    with pytest.raises(FileNotFoundError, match="no folder .*absent"):
        read_results([tmp_path / "absent"])


def test_a_model_measured_twice_with_other_settings_names_both_files(tmp_path):
    first = save(tmp_path / "a", "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, {**CLIP, "k": 20})
    second = save(tmp_path / "b", "knn", "CLIP", "birds", {"k-NN": 51.0}, 224, {**CLIP, "k": 10})
    with pytest.raises(ValueError, match=r"k \(20, 10\)") as error:
        read_results([tmp_path / "a", tmp_path / "b"])
    assert str(first) in str(error.value) and str(second) in str(error.value)
    save(tmp_path / "b", "knn", "CLIP", "birds", {"k-NN": 51.0}, 224, {**CLIP, "k": 20})
    with pytest.raises(ValueError, match="with different metrics"):
        read_results([tmp_path])
    save(tmp_path / "b", "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, {**CLIP, "k": 20})
    assert len(read_results([tmp_path])) == 1  # a copy is no second measurement


def test_a_speed_with_windows_does_not_stand_beside_quality_without(tmp_path):
    save(tmp_path, "knn", "mine", "birds", {"k-NN": 50.0}, 64, STUDENT)
    windowed = {**STUDENT, "window_size": 2}
    save(tmp_path, "throughput", "mine", "64x64, windows of 2 patches", {"Throughput": 99.0}, 64, windowed)
    assert report_table(read_results([tmp_path]))[0].rows[0].throughput is None
    save(tmp_path, "throughput", "mine", "64x64", {"Throughput": 12.0}, 64, STUDENT)
    assert report_table(read_results([tmp_path]))[0].rows[0].throughput == 12.0


def test_one_name_for_two_models_names_both_files(tmp_path):
    first = save(tmp_path, "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    retrained = save(tmp_path, "knn", "CLIP", "cars", {"k-NN": 50.0}, 224, {**CLIP, "weights": "others"})
    with pytest.raises(ValueError, match="different models 'CLIP'.*weights changed") as error:
        read_results([tmp_path])
    assert str(first) in str(error.value) and str(retrained) in str(error.value)
    retrained.unlink()
    # the same weights in another dtype, or with a position table of another size, have another digest
    half = {**CLIP, "dtype": "bfloat16"}
    save(tmp_path, "throughput", "CLIP", "224x224, bfloat16", {"Throughput": 5.0}, 224, half)
    resized = save(tmp_path, "segmentation", "CLIP", "ADE20K", {"mIoU": 5.0}, 512, {**CLIP, "weights": "resized"})
    assert len(read_results([tmp_path])) == 3
    save(tmp_path, "segmentation", "CLIP", "ADE20K", {"mIoU": 5.0}, 512, {**CLIP, "model": "open_clip:other"})
    with pytest.raises(ValueError, match="open_clip:clip, open_clip:other"):
        read_results([tmp_path])
    assert resized.exists()


def test_a_model_that_was_moved_between_two_results_is_one(tmp_path):
    save(tmp_path, "knn", "mine", "birds", {"k-NN": 50.0}, 224, STUDENT)
    moved = {**STUDENT, "model": "elsewhere/mine", "weights": f"{STUDENT['model']} float32"}
    save(tmp_path, "segmentation", "mine", "ADE20K", {"mIoU": 5.0}, 512, moved)
    assert len(report_table(read_results([tmp_path]))[0].rows) == 1


def test_of_several_throughputs_the_row_has_the_one_at_its_resolution_without_a_decoder(tmp_path):
    save(tmp_path, "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    save(tmp_path, "throughput", "CLIP", "336x336", {"Throughput": 5.0}, 336, {**CLIP, "decoder": "linear"})
    table, _ = report_table(read_results([tmp_path]))
    assert table.rows[0].throughput == 5.0 and "Throughput of CLIP at 336 px" in table.notes[-1]
    assert table.rows[0].speeds == {"k-NN": None}
    save(tmp_path, "throughput", "CLIP", "448x448", {"Throughput": 3.0}, 448, {**CLIP, "decoder": "linear"})
    table, _ = report_table(read_results([tmp_path]))
    assert table.rows[0].throughput is None
    assert table.notes[-1] == "Throughput of CLIP: measured at 336 and 448 px, none of which is the row's."
    save(tmp_path, "throughput", "CLIP", "224x224, linear", {"Throughput": 8.0}, 224, {**CLIP, "decoder": "linear"})
    assert report_table(read_results([tmp_path]))[0].rows[0].throughput == 8.0
    save(tmp_path, "throughput", "CLIP", "224x224", {"Throughput": 9.0}, 224, {**CLIP, "decoder": "none"})
    assert report_table(read_results([tmp_path]))[0].rows[0].throughput == 9.0
    save(tmp_path, "throughput", "CLIP", "224x224, cuda", {"Throughput": 99.0}, 224, {**CLIP, "decoder": "none"})
    with pytest.raises(
        ValueError, match=r"224x224-cuda.json and .*224x224.json, and its row, at 224 px, has room for"
    ):
        report_table(read_results([tmp_path]))


def test_each_metric_has_the_speed_at_its_own_resolution(tmp_path):
    """The picture draws masks of 128 pixels over images/s at 128 pixels, not over those of the row's 64."""
    save(tmp_path, "knn", "mine", "birds", {"k-NN": 50.0}, 64, STUDENT)
    save(tmp_path, "sam-coco", "mine", "COCO", {"SAM COCO": 70.0}, 128, STUDENT)
    save(tmp_path, "segmentation", "mine", "ADE20K", {"mIoU": 40.0}, 512, STUDENT)
    for side, speed, decoder in ((64, 12.0, "none"), (128, 3.0, "none"), (128, 2.9, "sam")):
        settings = {**STUDENT, "decoder": decoder}
        save(tmp_path, "throughput", "mine", f"{side}, {decoder}", {"Throughput": speed}, side, settings)
    (row,) = report_table(read_results([tmp_path]))[0].rows
    assert row.throughput == 12.0 and row.speeds == {"SAM COCO": 3.0, "ADE20K": None}


def test_a_model_without_a_column_has_no_row(tmp_path):
    save(tmp_path, "resolution", "mine", "birds", {"k-NN @ 64": 50.0}, 64, STUDENT)
    save(tmp_path, "features", "mine", "birds", {"Norm, median": 5.0}, 64, STUDENT)
    with pytest.raises(ValueError, match="only results of features, resolution, .*measure one of zero-shot, knn"):
        report_table(read_results([tmp_path]))
    save(tmp_path, "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    table, files = write_report([tmp_path])
    assert [row.model for row in table.rows] == ["CLIP"] and [file.name for file in files] == [
        "report.md",
        "report.json",
    ]
    assert table.notes[-1] == "Without a row: mine, measured by features, resolution only."


def test_the_notes_have_seeds_counts_and_the_outputs_of_each_model(tmp_path):
    read = {"summary": "class tokens [0], 64 wide", "features": "last patch tokens, 64 wide", "adaptor": "clip"}
    save(tmp_path, "knn", "mine", "birds", {"k-NN": 50.0}, 64, {**STUDENT, **read})
    probe = {"method": "probe", "probe": {"seed": 3}}
    save(tmp_path, "segmentation", "mine", "ADE20K", {"mIoU": 5.0}, 64, {**STUDENT, **read, **probe}, "linear probe")
    table, _ = report_table(read_results([tmp_path]))
    assert table.notes == [
        "k-NN: birds; k = 20; 9 images.",
        "ADE20K: ADE20K; linear probe; seed 3; 9 images.",
        "Outputs of mine: summary: class tokens [0], 64 wide; features: last patch tokens, 64 wide; adaptor: clip.",
    ]


def test_files_of_the_report(tmp_path):
    save_all(tmp_path)
    table, files = write_report([tmp_path])
    assert [path.name for path in files] == [
        "report.md",
        "report.json",
        "report.png",
        "report.pdf",
        "mine.model-index.yaml",
    ]
    assert (tmp_path / "report.md").read_text() == table.to_markdown()
    assert Table.from_json((tmp_path / "report.json").read_text()) == table
    before = {path: path.read_bytes() for path in files}
    assert write_report([tmp_path])[0] == table  # the report is no result of its own
    assert {path: path.read_bytes() for path in files} == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_without_throughput_there_is_no_picture(tmp_path):
    save(tmp_path / "in", "knn", "CLIP", "birds", {"k-NN": 50.0}, 224, CLIP)
    _, files = write_report([tmp_path / "in"], tmp_path / "out" / "deep", "Only k-NN")
    assert [path.name for path in files] == ["report.md", "report.json"]
    assert files[0].read_text().startswith("### Only k-NN\n") and files[0].parent == tmp_path / "out" / "deep"


def test_the_hub_reads_the_model_index(tmp_path):
    save_all(tmp_path)
    _, files = write_report([tmp_path])
    text = files[-1].read_text()
    card = ModelCard(f"---\n{text}---\n# mine\n")
    assert {(e.task_type, e.metric_name): e.metric_value for e in card.data.eval_results} == {
        ("image-classification", "k-NN"): 81.104,
        ("zero-shot-image-classification", "Zero-shot"): 74.0,
        ("image-segmentation", "mIoU"): 9.5,
        ("image-segmentation", "aAcc"): 30.0,
        ("visual-question-answering", "GQA"): 60.0,
        ("visual-question-answering", "POPE F1"): 80.0,
        ("visual-question-answering", "POPE yes"): 51.0,
    }
    name, entries = model_index_to_eval_results(yaml.safe_load(text)["model-index"])
    assert name == "mine" and {entry.dataset_name for entry in entries} == {"Tiny set", "ADE20K", "LLaVA-1.5"}


def test_roles_are_told_from_what_evaluation_itself_writes(tmp_path):
    """Through the command line's own way: a student, a teacher with its type, a vision model of transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "max_img_size": 64}
    RadioModel(RadioConfig(**sizes, image_size=64)).save_pretrained(tmp_path / "mine")
    teachers = resources.files("transformers_radio.quickstart") / "teachers"
    models = [str(tmp_path / "mine"), str(teachers / "dinov2"), f"CLIP=open_clip:{teachers / 'clip'}"]
    settings = ["batch_sizes=[1]", "repeats=1", "warmup=0"]
    run_task("throughput", models, None, None, tmp_path / "results", settings)
    table, files = write_report([tmp_path / "results"])
    assert [row.model for row in table.rows] == ["CLIP", "dinov2", "mine"]
    assert [path.name for path in files] == ["report.md", "report.json"]  # the Hub has no word for speed
    written = json.loads(result_file(tmp_path, "mine").read_text())
    assert table.rows[2].throughput == written["metrics"]["Throughput"] and table.rows[2].params == written["params"]


def result_file(folder, model):
    (path,) = (folder / "results" / model).glob("throughput.*.json")
    return path
