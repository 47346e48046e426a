"""What `eval` refuses for every task before the task begins, and where it has its models from."""

import re
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from helpers.paths import ROOT
from helpers.tiny_sam import make_student
from transformers_radio import precision
from transformers_radio.cli import app
from transformers_radio.evaluation import processes
from transformers_radio.evaluation import run as run_module
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import TASKS, load_task, named_models, run_task
from transformers_radio.teachers.known import known_teacher

RECIPES = ROOT / "recipes" / "evaluation"
SETTINGS = {
    "segmentation": ("data", "ade20k", []),
    "sam-coco": ("data", "coco2017", []),
    "llava": ("data", "llava", ["language_model=small"]),
    "throughput": (None, None, []),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "student"
    make_student().save_pretrained(folder)
    return folder


@pytest.fixture
def begun(monkeypatch):
    """The tasks that were begun; none does anything."""
    tasks = []
    for task in TASKS:
        monkeypatch.setattr(load_task(task), "run", lambda *_, task=task: tasks.append(task))
    return tasks


def start(task, models, output):
    data, recipe, overrides = SETTINGS.get(task, ("data", None, []))
    run_task(task, models, data, recipe and RECIPES / f"{recipe}.yaml", output, overrides)


@pytest.mark.parametrize("task", list(TASKS))
def test_models_that_would_share_their_files_are_refused(task, student, tmp_path, begun):
    for titles in (("", ""), ("a b=", "a-b=")):
        with pytest.raises(ValueError, match="Two of .* have one name: give them titles, as TITLE=MODEL"):
            start(task, [f"{title}{student}" for title in titles], tmp_path)
    assert begun == []
    start(task, [str(student), f"other={student}"], tmp_path)
    assert begun == [task]


@pytest.mark.parametrize("task", list(TASKS))
def test_more_processes_than_a_task_can_use_are_refused(task, student, tmp_path, begun, monkeypatch):
    monkeypatch.setattr(processes, "process_state", lambda: SimpleNamespace(num_processes=2, is_main_process=False))
    if not load_task(task).several_processes:
        with pytest.raises(ValueError, match=f"eval {task} runs in one process, but 2 were started"):
            start(task, [str(student)], tmp_path)
    else:
        start(task, [str(student)], tmp_path)
    assert begun == ([task] if load_task(task).several_processes else [])
    one_process = {name for name in TASKS if not load_task(name).several_processes}
    assert one_process == {"sam-coco", "throughput", "resolution", "features"}


# Million parameters and resolution in the paper's Table 1
TABLE_1 = {
    "OpenCLIP-H/14": (632, 224),
    "MetaCLIP-H/14": (632, 224),
    "SigLIP-L/14": (428, 384),
    "DFN-CLIP-H/14": (633, 378),
    "OpenAI-CLIP-L/14": (305, 336),
    "DINOv2-g/14-reg": (1137, 224),
    "SAM-H/16": (637, 1024),
    "InternViT-6B-224": (5902, 224),
    "InternViT-6B-448": (5537, 448),
}


def test_the_baselines_of_table_1_are_the_papers():
    path = RECIPES / "table1.yaml"
    models = named_models(path, [])
    assert [ModelSpec.parse(model).title for model in models] == list(TABLE_1)
    for model in models:
        spec, side = ModelSpec.parse(model), int(model.rpartition("@")[2])
        teacher = known_teacher(spec.kind, spec.checkpoint, side)
        params = sum(parameter.numel() for parameter in teacher.parameters())
        millions, resolution = TABLE_1[spec.title]
        assert (params / 1e6, side) == (pytest.approx(millions, abs=0.8), resolution), spec.title
    # the commands of its header name what is in it
    named = re.findall(r"--model (\S+[/.-]\S+)", path.read_text())
    assert set(named) - {"runs/mine/student", "..."} == set(TABLE_1)


def test_models_come_from_a_file_all_or_chosen_and_others_beside_them(student, tmp_path, begun, monkeypatch):
    file = tmp_path / "models.yaml"
    file.write_text(f"mine: {student}@32\nA/B: timm:vit\n")
    monkeypatch.setattr(load_task("throughput"), "run", lambda self, models: begun.append(models))
    for chosen in ([], ["A/B", f"x={student}"]):
        run_task("throughput", named_models(file, chosen), output=tmp_path)
    assert begun == [[f"mine={student}@32", "A/B=timm:vit"], ["A/B=timm:vit", f"x={student}"]]
    for text, message in (("- a\n", "holds no models"), ("a: [b\n", "cannot be read"), ("a: {b: c}\n", "holds no")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"models.yaml {message}"):
            named_models(file, [])
    with pytest.raises(FileNotFoundError, match="no file of models .*absent.yaml"):
        named_models(tmp_path / "absent.yaml", [])


def test_a_size_behind_a_model_is_its_side_where_none_is_asked_for(student):
    own = load_encoder(str(student)).image_size
    assert own != 32
    encoder = load_encoder(f"a={student}@32")
    assert (encoder.name, str(encoder.spec), encoder.image_size) == ("a", str(student), 32)
    assert load_encoder(f"{student}@32", 48).image_size == 48
    with pytest.raises(ValueError, match="multiples of 8, not 30 x 30"):
        load_encoder(f"{student}@30")
    # a folder of such a name is a folder
    (student.parent / "b@16").symlink_to(student)
    assert load_encoder(f"a={student.parent / 'b@16'}").image_size == own


@pytest.mark.parametrize(
    ("task", "override", "advice"),
    [
        ("throughput", "dtype=bfloat16", "Set dtype=float32."),
        ("llava", "hardware.bf16=true", "Set hardware.bf16=false."),
        ("segmentation", "probe.mixed_precision=bf16", "Set probe.mixed_precision=no."),
        ("throughput", "dtype=float32", None),
    ],
)
def test_a_precision_that_this_cpu_computes_slowly_is_warned_about_once(
    student, tmp_path, begun, monkeypatch, caplog, task, override, advice
):
    monkeypatch.setattr(precision, "is_fast", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 61.8)
    data, recipe, overrides = SETTINGS[task]
    run_task(task, [str(student)], data, recipe and RECIPES / f"{recipe}.yaml", tmp_path, [*overrides, override])
    warned = [message for message in caplog.messages if "times as long" in message]
    assert begun == [task] and len(warned) == (advice is not None)
    assert not warned or ("61.8" in warned[0] and warned[0].endswith(advice))


def test_names_and_protocols_are_printed_as_they_are(monkeypatch):
    result = Result("knn", "x[/red] [dim]", "a[b]", {"k-NN": 5.0}, "text tower open_clip:package:clip", {}, {}, 1, 32)
    monkeypatch.setattr(run_module, "run_task", lambda *_: [result])
    printed = CliRunner().invoke(app, ["eval", "knn"])
    assert printed.exit_code == 0
    assert "x[/red] [dim]  k-NN 5.00" in printed.output and "a[b]: text tower open_clip:package:clip" in printed.output
