"""A student is any backbone: one of convolutions, added by a file and one line, goes wherever students go."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.added_student import LINE, train_added, write_modeling
from helpers.classification_world import pictures, write_folders
from helpers.forked import Forked, finish, fork_group
from helpers.groups_of_processes import FSDP
from helpers.segmentation_set import LITTLE, describe, write_set
from transformers_radio import RadioModel, modeling
from transformers_radio.evaluation.run import run_task
from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.count import make_plan
from transformers_radio.training.plan.tables import print_plan

# With lanes and micro batches the images of a step are the same for any number of processes.
CHANGES = {
    "student": {"type": "conv_student", "size": "small", "summary": "mean"},
    "stages": {
        "main": {
            "steps": 4,
            "groups": {
                "low": {"teachers": ["clip"], "resolution": 32, "batch_size": 4, "micro_batch_size": 2},
                "high": {
                    "teachers": ["sam"],
                    "resolution": 48,
                    "batch_size": 4,
                    "micro_batch_size": 2,
                    "rate": 0.5,
                },
            },
        },
        "late": {"steps": 4, "resolution": 32, "batch_size": 4, "micro_batch_size": 2, "teachers": ["clip", "new"]},
    },
    # a gradient that is zero except for rounding must not become a whole step of Adam
    "loss": {"balancing": "uncertainty", "standardization": "phi_s", "statistics_images": 24},
    "ema_decay": 0.9,
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-3},
    "checkpoints": {"every_steps": 2, "keep": 9},
    "log_every_steps": 1,
}
NEW = {
    "type": "python",
    "checkpoint": "helpers.tiny_teachers:PatchTeacher",
    "image_size": 24,
    "options": {"width": 12},
}


@pytest.fixture(scope="module")
def folder_of_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modeling")
    write_modeling(folder)
    modeling.__path__.append(str(folder))
    yield folder
    modeling.__path__.remove(str(folder))


@pytest.fixture(autouse=True)
def line_of_student(folder_of_code, monkeypatch):
    monkeypatch.setitem(modeling.STUDENTS, *LINE)


def write_recipe(folder, recipe_text, images, name="run"):
    recipe = yaml.safe_load(recipe_text.format(output=folder / name, images=images))
    recipe |= CHANGES
    recipe["teachers"]["new"] = NEW
    recipe["data"]["lanes"] = 4
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture
def conv_recipe(tmp_path, recipe_text, image_folder):
    return write_recipe(tmp_path, recipe_text, image_folder)


@pytest.fixture(scope="module")
def finished(folder_of_code, tmp_path_factory, recipe_text, image_folder):
    """A run of one process that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modeling.STUDENTS, *LINE)
        folder = tmp_path_factory.mktemp("finished")
        train(load_recipe(write_recipe(folder, recipe_text, image_folder)))
    return folder / "run"


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_it_is_trained_in_groups_and_stages(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["main"] * 4 + ["late"] * 4
    assert ["sam/features" in line for line in lines[:4]] == [True, False, True, False]
    assert "new/summary" in lines[4] and "sam/features" not in lines[4]
    assert lines[3]["clip/features"] < lines[0]["clip/features"]
    names = {part.split(".")[1] for part in weights(finished / "student") if part.startswith("adaptors.")}
    assert names == {"clip", "sam", "new"}
    before, after = (
        load_file(finished / "checkpoints" / f"step-0000000{step}" / "training_state" / "model.safetensors")
        for step in (4, 8)
    )
    assert not [name for name in before if name.startswith("student.adaptors.new.")]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "student.stem.weight" in changed and not [name for name in changed if ".sam." in name]


def test_killed_and_started_again_it_ends_with_the_same_bits(finished, conv_recipe, folder_of_code, tmp_path):
    process = Forked(folder_of_code, conv_recipe, target=train_added, CUDA_VISIBLE_DEVICES="")
    while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    again = Forked(folder_of_code, conv_recipe, target=train_added, CUDA_VISIBLE_DEVICES="")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    expected, found = weights(finished / "student"), weights(tmp_path / "run" / "student")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_sharded_over_two_processes_it_is_that_of_one(finished, conv_recipe, folder_of_code, tmp_path):
    finish(fork_group(2, folder_of_code, conv_recipe, target=train_added, **FSDP))
    expected, found = weights(finished / "student"), weights(tmp_path / "run" / "student")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_the_finished_student_opens_without_the_package(finished, tmp_path):
    pixels = torch.rand(2, 3, 40, 48)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        f"model = AutoModel.from_pretrained({str(finished / 'student')!r}, trust_remote_code=True).eval()\n"
        f"processor = AutoImageProcessor.from_pretrained({str(finished / 'student')!r}, trust_remote_code=True)\n"
        "output = model(torch.load('pixels.pt'))\n"
        "heads = {name: [head.summary, head.features] for name, head in output.adaptors.items()}\n"
        "torch.save([output.summary, output.features, output.grid, heads, processor.size], 'out.pt')\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    summary, features, grid, heads, size = torch.load(tmp_path / "out.pt", weights_only=False)
    output = modeling.student_class("conv_student").from_pretrained(finished / "student").eval()(pixels)
    assert torch.equal(summary, output.summary) and torch.equal(features, output.features) and grid == (5, 6)
    assert heads.keys() == {"clip", "sam", "new"}
    for name, (head_summary, head_features) in heads.items():
        assert torch.equal(head_features, output.adaptors[name].features)
        assert (head_summary is None) == (name == "sam")
    assert dict(size)["height"] == 32  # where the teachers with a summary taught


def test_a_plan_counts_it(conv_recipe, capsys):
    print_plan(load_recipe(conv_recipe), processes=2, gpu="h100")
    text = capsys.readouterr().out
    assert (
        "student (conv_student): 0.00 M parameters" in text and "0 blocks, summary 16 wide, features 16 wide" in text
    )
    assert "48 (6x6)" in text and "samples seen: 40" in text and "GPU-hours" in text


def test_its_flops_are_those_counted_by_hand(conv_recipe):
    plan = make_plan(load_recipe(conv_recipe, ["loss.balancing=naive"]), processes=1, device=torch.device("cpu"))
    # at 32 pixels: convolutions of 4 x 4 and 2 x 2, at 8 x 8 and 4 x 4 positions; clip's heads, 20 wide within
    expected = 64 * (3 * 4 * 4) * 16 + 16 * (16 * 2 * 2) * 16 + (1 + 16) * (16 * 20 + 20 * 16)
    assert plan.steps["main"]["low"].forward_flops == 2 * expected
    assert plan.steps["main"]["low"].attention_flops == 0


def test_it_starts_from_its_checkpoint_and_grows_a_head(finished, conv_recipe, tmp_path):
    overrides = [
        f"student.checkpoint={finished / 'student'}",
        "student.summary=cls_per_teacher",  # the checkpoint says how it summarizes
        f"output_dir={tmp_path / 'more'}",
        "teachers.more={type: python, checkpoint: 'helpers.tiny_teachers:PatchTeacher', image_size: 24}",
        "stages.late.teachers=[more, new]",
        "student.config.preferred_resolution=40",
    ]
    result = train(load_recipe(conv_recipe, overrides))
    student = modeling.student_class("conv_student").from_pretrained(result.student_dir)
    assert student.adaptors.keys() == {"clip", "sam", "new", "more"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.type=toi"], "student.type is 'toi'; expected one of radio"),
        (["student.size=vit-b-16"], "size is 'vit-b-16'; choose one of small, large"),
        (["student.summary=cls"], "summary is 'cls'; this student has no CLS tokens"),
        (
            ["student.config={hiden_size: 8}"],
            "student.config.hiden_size is not a field of ConvStudentConfig; did you mean hidden",
        ),
        (["student.attn_implementation=eager"], "have no attention to choose"),
        (["student.config={hidden_size: eight}"], "student.config {'hidden_size': 'eight'} gives no student"),
        (
            ["student.compile=true"],
            "student.compile acts on a student's blocks, and students of the type conv_student name none",
        ),
        (["student.gradient_checkpointing=true"], "student.gradient_checkpointing acts on"),
        (["student.spectral_reparam=true"], "student.spectral_reparam acts on"),
        (["stages.late.resolution=36"], "multiples of 8 up to 256, the nearest is"),
    ],
)
def test_what_it_cannot_do_is_said_before_the_first_step(overrides, message, conv_recipe, tmp_path):
    for attempt in (print_plan, train):
        with pytest.raises(ValueError, match=re.escape(message)):
            attempt(load_recipe(conv_recipe, overrides))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_type_is_refused(finished, make_recipe):
    with pytest.raises(ValueError, match="holds a model of the type conv_student, and student.type is radio"):
        train(load_recipe(make_recipe(), [f"student.checkpoint={finished / 'student'}"]))


def test_it_teaches_another_student(finished, make_recipe, tmp_path):
    """As itself, and in the space of one of its own teachers."""
    teacher = f"type: transformers, checkpoint: {finished / 'student'}, image_size: 24"
    overrides = [
        f"teachers.itself={{{teacher}}}",
        f"teachers.as_clip={{{teacher}, options: {{adaptor: clip}}}}",
        "stages.main={steps: 2, warmup_steps: 0}",
    ]
    recipe = load_recipe(make_recipe(), overrides)
    print_plan(recipe)
    student = RadioModel.from_pretrained(train(recipe).student_dir)
    widths = {name: (one["summary_dim"], one["feature_dim"]) for name, one in student.config.adaptors.items()}
    assert widths["itself"] == widths["as_clip"] == (16, 16)


def test_it_is_evaluated(finished, tmp_path):
    """k-NN and a segmentation probe tell colors apart by its features, and it is timed."""
    model = [f"mine={finished / 'student'}"]
    for split, seed in (("train", 0), ("test", 1)):
        write_folders(tmp_path / "classes", split, pictures(30, seed))
    settings = ["split=test", "k=5", "num_workers=1", "image_size=[24, 24]"]
    (knn,) = run_task("knn", model, str(tmp_path / "classes"), None, tmp_path / "out", settings)
    assert knn.metrics["k-NN"] > 50 and "16 wide" in knn.settings["summary"]

    data = asdict(describe(write_set(tmp_path / "colors")))
    (tmp_path / "segmentation.yaml").write_text(yaml.safe_dump({"data": data, "probe": LITTLE}))
    (probe,) = run_task("segmentation", model, None, tmp_path / "segmentation.yaml", tmp_path / "out")
    assert probe.metrics["mIoU"] > 50

    settings = ["device=cpu", "repeats=2", "warmup=1", "batch_sizes=[1, 2]", "image_size=40"]
    (speed,) = run_task("throughput", model, None, None, tmp_path / "out", settings)
    assert speed.metrics["Throughput"] > 0 and speed.metrics["GFLOPs an image"] > 0
    with pytest.raises(ValueError, match="no attention windows"):
        run_task("throughput", model, None, None, tmp_path / "windows", [*settings, "window_size=2"])
