"""Names that results and settings have from paths, and the home folder in every one of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.classification_world import pictures, write_folders
from helpers.tiny_sam import make_student
from transformers_radio.cli import app
from transformers_radio.evaluation.classification.config import KnnConfig, ZeroShotConfig
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.llava.config import LlavaConfig
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.paths import expand_home, path_name
from transformers_radio.evaluation.report.model_card import eval_results
from transformers_radio.evaluation.result import Result, result_path, slug
from transformers_radio.evaluation.run import load_config, run_task
from transformers_radio.evaluation.sam_coco.config import SamCocoConfig
from transformers_radio.evaluation.segmentation.config import SegmentationTaskConfig
from transformers_radio.evaluation.workspace import work_folder
from transformers_radio.visualization.run import VisualizeConfig

KNN = ["k=1", "num_workers=1"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a student and a set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_student().save_pretrained(tmp_path / "student")
    for split in ("train", "val"):
        write_folders(tmp_path / "birds", split, pictures(3, seed=0))
    return tmp_path


@pytest.mark.parametrize(
    ("where", "model", "data"),
    [("student", ".", "../birds"), ("birds/train", "../../student/", ".."), (".", "./student", "birds/.")],
)
def test_results_are_named_by_model_and_data_however_they_are_written(where, model, data, home, monkeypatch):
    monkeypatch.chdir(home / where)
    (result,) = run_task("knn", [model], data, None, home / "out", KNN)
    assert (result.model, result.data) == ("student", "birds")
    assert (home / "out" / "student" / "knn.birds.json").is_file()


def test_names_of_files_can_be_read_and_differ():
    alike = [("a b", "a-b"), ("mine/student", "mine-student"), ("ViT-H-14:dfn5b", "ViT-H-14-dfn5b")]
    alike += [("COCO 2017", "COCO-2017"), ("32x32, float32, cpu", "32x32-float32-cpu"), ("Vögel", "Vögel")]
    assert [slug(name) for name, _ in alike] == [expected for _, expected in alike]
    assert slug("re\u0301sume\u0301") == slug("r\u00e9sum\u00e9")  # two ways to write one name
    names = [
        "鳥",
        "птицы",
        "पक्षी",
        "पक्षि",
        "🐦",
        "🐕",
        "100%",
        "100#",
        "100",
        "C++",
        "C#",
        "[a]",
        "(a)",
        "a",
        ".a",
        "%",
        "#",
    ]
    names += ["x" * 200, "x" * 200 + "y", "鳥" * 90, "鳥" * 91]
    files = [slug(name) for name in names]
    assert len(set(files)) == len(names) and all(len(file.encode()) < 200 and "/" not in file for file in files)
    assert not any(file.startswith(".") for file in files)


def test_two_sets_of_other_scripts_are_two_results(home, tmp_path):
    results = []
    for number, name in enumerate(["鳥", "птицы", "100%", "100#"]):
        write_folders(tmp_path / name, "train", pictures(3, seed=number))
        write_folders(tmp_path / name, "validation", pictures(3, seed=9))
        results += run_task("knn", [f"模型={home / 'student'}"], str(tmp_path / name), None, home / "out", KNN)
    assert [Result.read(path) for path in map(Path, (home / "out").rglob("knn.*.json"))]
    assert len(list((home / "out" / "模型").glob("knn.*.json"))) == 4
    assert eval_results(results[0])[0].dataset_type == "鳥"


def test_names_that_make_one_file_are_refused_and_results_of_earlier_versions_found(tmp_path):
    result = Result("knn", "Ö", "a b", {"k-NN": 1.0}, "")
    path = result_path(tmp_path, "m", "knn", "a b")
    Result("knn", "m", "a b", {"k-NN": 1.0}, "").write(path)
    with pytest.raises(ValueError, match="holds the result of 'm' on 'a b'.*'m' on 'a-b' would have its name"):
        result_path(tmp_path, "m", "knn", "a-b")
    result.write(tmp_path / "unnamed" / "knn.a-b.json")
    path = result_path(tmp_path, "Ö", "knn", "a b")
    assert path == tmp_path / "unnamed" / "knn.a-b.json" and work_folder(path) == path.with_suffix("")
    assert result_path(tmp_path, "Ä", "knn", "a b") == tmp_path / "Ä" / "knn.a-b.json"


def test_names_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {".": tmp_path.name, "..": tmp_path.parent.name, "./": tmp_path.name, "a/b/": "b", "birds/*.tar": "birds"}
    names |= {"birds/**/x.jpg": "birds", "ILSVRC/imagenet-1k": "imagenet-1k", "https://h/a/b.tar": "b.tar"}
    assert {path: path_name(path) for path in names} == names
    (tmp_path / "[1]").mkdir()
    assert path_name("[1]") == "[1]" and path_name("[1]/.") == "[1]"
    (tmp_path / "lr=1").mkdir()
    assert ModelSpec.parse("lr=1") == ModelSpec("lr=1", None, "lr=1")
    assert ModelSpec.parse("one=lr") == ModelSpec("one", None, "lr")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/a", "HOME/a"),
        ("~", "HOME"),
        ("one=~/a", "one=HOME/a"),
        ("open_clip:~/a", "open_clip:HOME/a"),
        ("one=open_clip:ViT-B-32:~/a.pt", "one=open_clip:ViT-B-32:HOME/a.pt"),
        ("a/~b", "a/~b"),
        ("https://host/~b", "https://host/~b"),
        ("a ~ b", "a ~ b"),
        ("x\ny", "x\ny"),
    ],
)
def test_the_home_folder_is_where_a_path_begins(written, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_home(written) == meant.replace("HOME", "/somewhere")


def test_every_path_of_the_commands_may_begin_with_the_home_folder(home, monkeypatch):
    (home / "knn.yaml").write_text("data: ~/birds\nk: 1\nnum_workers: 1\n")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(home / "one.png")
    monkeypatch.chdir(home / "birds")
    for arguments in (
        ["eval", "knn", "--model", "m=~/student", "--recipe", "~/knn.yaml", "--output", "~/out"],
        ["report", "~/out", "--output", "~/report"],
        ["visualize", "features", "--model", "~/student", "--data", "~/one.png", "--output", "~/pictures"],
    ):
        run = CliRunner().invoke(app, arguments)
        assert run.exit_code == 0, (run.output, run.exception)
    for file in ("out/m/knn.birds.json", "report/report.md", "pictures/features.png"):
        assert (home / file).is_file()
    assert not list(home.rglob("~*"))
    written = json.loads((home / "out" / "m" / "knn.birds.json").read_text())["settings"]
    assert written["model"] == str(home / "student") and written["bank"]["source"] == str(home / "birds")
    assert load_encoder("~/student").name == f"{home.name}/student" and LabeledSplit("~/birds", "train").count() == 3


def test_every_path_among_the_settings_may_begin_with_the_home_folder(home):
    settings = {
        SegmentationTaskConfig: ["data.path=~/a", "data.name=x", "data.classes=[a]", "text=open_clip:~/a"]
        + ["data.splits={train: [{images: ~/a, masks: ~/a, names: ~/a}]}"],
        SamCocoConfig: ["data=~/a", "sam=~/a", "detections=~/a"],
        LlavaConfig: ["data=~/a", "language_model=~/a", "questions.q.questions=~/a", "questions.q.images=~/a"]
        + [f"{phase}.{key}=~/a" for phase in ("pretrain", "finetune") for key in ("images", "conversations")]
        + [f"{phase}.{key}=1" for phase in ("pretrain", "finetune") for key in ("learning_rate", "batch_size")],
        ZeroShotConfig: ["data=~/a", "classes=~/a", "templates=~/a"],
        VisualizeConfig: ["data=~/a", "sam=~/a", "text=transformers:~/a"],
    }
    for schema, overrides in settings.items():
        text = repr(load_config(schema, None, None, overrides))
        assert "~" not in text and text.count(str(home / "a")) == repr(overrides).count("~/a")


def test_a_text_is_taken_as_it_is_written(home, monkeypatch):
    monkeypatch.chdir(home)
    os.makedirs(home / "[1] a")
    (home / "[1] a" / "100% #1.txt").write_text("a\n")
    for text in ("100% #1", "[2021] x", "2024_01", "no", "1e3", "a: b", "*.tar", "@x", "null-ish"):
        config = load_config(KnnConfig, None, None, [f"data={text}", f"name={text}", "k=3", "image_size=[8,8]"])
        assert (config.data, config.name, config.k, config.image_size) == (text, text, 3, [8, 8])
    config = load_config(ZeroShotConfig, None, None, ["data='a b'", "name=null", "classes=[1] a/100% #1.txt"])
    assert (config.data, config.name, config.classes) == ("a b", None, "[1] a/100% #1.txt")


def test_errors_of_settings_name_their_level(home):
    (home / "broken.yaml").write_text("data: [")
    for schema, overrides, message in (
        (SegmentationTaskConfig, ["probe.iteration=3"], r"probe.iteration: .*The settings of probe are iterations, "),
        (
            SegmentationTaskConfig,
            ["probe.iterations=x"],
            r"probe.iterations: .*The settings of probe are iterations, ",
        ),
        (LlavaConfig, ["hardware.bf=1"], r"hardware.bf: .*The settings of hardware are per_device_batch_size, "),
        (KnnConfig, ["kk=1"], r"kk: .*The settings are data, "),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(schema, None, None, overrides)
    with pytest.raises(ValueError, match="broken.yaml cannot be read as YAML"):
        load_config(KnnConfig, None, home / "broken.yaml", [])
