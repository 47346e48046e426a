"""E-RADIO in training: two groups and two stages, killed and resumed, in one process and in two; batch norm."""

import json
import math
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from helpers.forked import Forked, finish, fork_group
from helpers.groups_of_processes import FSDP
from helpers.paths import ROOT
from transformers_radio import ERadioConfig, ERadioModel, RadioImageProcessor
from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.count import make_plan
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.stability.batch_norm import BatchNorms, StepBatchNorm, replace_batch_norms
from transformers_radio.training.student import TeacherShape, build_student

CONFIG = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2], "stem_channels": 8}
CHANGES = {
    "student": {"type": "eradio", "size": "b", "config": CONFIG},
    "stages": {
        "main": {
            "steps": 4,
            "groups": {
                "low": {"teachers": ["clip"], "resolution": 64, "batch_size": 4},
                "high": {"teachers": ["sam"], "resolution": 96, "batch_size": 4, "rate": 0.5},
            },
        },
        "late": {"steps": 4, "resolution": 64, "batch_size": 4, "teachers": ["clip", "sam"]},
    },
    "ema_decay": 0.9,
    # a gradient that is zero except for rounding must not become a whole step of Adam
    "optimizer": {"learning_rate": 1e-3, "eps": 1e-3},
    "checkpoints": {"every_steps": 2, "keep": 9},
    "log_every_steps": 1,
}
PATCHES = (("type", "python"), ("checkpoint", "helpers.tiny_teachers:PatchTeacher"), ("image_size", 64))
LOCAL = ["stages.late.batch_norm=local", "stages.late.micro_batch_size=2"]


@pytest.fixture(scope="module")
def write(recipe_text, image_folder):
    def write(folder, stages=("main", "late")):
        recipe = yaml.safe_load(recipe_text.format(output=folder / "run", images=image_folder))
        recipe |= CHANGES | {"stages": {name: CHANGES["stages"][name] for name in stages}}
        recipe["data"]["lanes"] = 4
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return folder / "recipe.yaml"

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write):
    """A run of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(load_recipe(write(folder)))
    return folder / "run"


def weights(run):
    return load_file(run / "student" / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_trained_in_groups_and_stages(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert ["sam/features" in line for line in lines] == [True, False, True, False, True, True, True, True]
    assert lines[3]["clip/features"] < lines[0]["clip/features"]
    student = ERadioModel.from_pretrained(finished / "student")
    assert type(student) is ERadioModel and list(student.adaptors) == ["clip", "sam"]
    norm = student.stem.conv1.norm
    assert norm.num_batches_tracked == 8 and norm.running_mean.abs().min() > 0
    processor = RadioImageProcessor.from_pretrained(finished / "student")
    assert processor.size_divisor == 32 and processor.size["height"] == 64
    assert (finished / "student" / "modeling_eradio.py").exists()
    # the average is that of the statistics, too
    state = load_file(finished / "checkpoints" / "step-00000008" / "training_state" / "model.safetensors")
    assert not torch.equal(state["student.stem.conv1.norm.running_mean"], norm.running_mean)


def test_killed_and_started_again_it_ends_with_the_same_bits(finished, write, tmp_path):
    recipe = write(tmp_path)
    process = Forked(recipe, CUDA_VISIBLE_DEVICES="")
    while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    again = Forked(recipe, CUDA_VISIBLE_DEVICES="")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    expected, found = weights(finished), weights(tmp_path / "run")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def run(write, folder, processes, *overrides, **environment):
    """The finished student's weights after training in forked processes."""
    folder.mkdir()
    finish(fork_group(processes, write(folder, ["late"]), *overrides, **environment))
    return load_file(folder / "run" / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory, write, image_folder):
    """A recipe whose every batch is the same four crops, however many processes share it, and one process's result."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "images").mkdir()
    for index in range(4):
        (folder / "images" / f"{index}.png").write_bytes(
            (image_folder / f"part{index % 3}" / f"{index:02d}.png").read_bytes()
        )
    overrides = [f"data.path={folder / 'images'}", "data.frozen_crops=true"]
    return overrides, run(write, folder / "one", 1, *overrides, "data.lanes=1")


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_normalized_together_two_processes_train_as_one(together, write, tmp_path, environment):
    overrides, expected = together
    assert_same(run(write, tmp_path / "two", 2, *overrides, "data.lanes=2", **environment), expected)


def test_normalized_each_for_itself_two_processes_train_as_one_with_the_same_passes(write, tmp_path):
    assert_same(run(write, tmp_path / "two", 2, *LOCAL), run(write, tmp_path / "one", 1, *LOCAL))


def test_frozen_statistics_rest_and_the_weights_learn(finished, write, tmp_path):
    overrides = ["stages.late.batch_norm=frozen", "ema_decay=null", "student.gradient_checkpointing=true"]
    train(load_recipe(write(tmp_path), overrides))
    middle, end = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "training_state" / "model.safetensors")
        for step in (4, 8)
    )
    rested = {name.split(".")[-1] for name in middle if torch.equal(middle[name], end[name])}
    assert {"running_mean", "running_var", "num_batches_tracked"} <= rested
    assert not torch.equal(middle["student.neck.norms.0.weight"], end["student.neck.norms.0.weight"])


def test_batch_norm_is_torch_s_own_over_a_step_of_one_pass():
    torch.manual_seed(0)
    expected, found = (nn.Sequential(nn.BatchNorm2d(5, momentum=0.3)) for _ in range(2))
    replace_batch_norms(found, "sync")
    assert type(found[0]) is StepBatchNorm and found.state_dict().keys() == expected.state_dict().keys()
    norms = BatchNorms(found, {})
    for _ in range(3):
        maps = torch.randn(2, 5, 3, 4) * 3 + 1
        images = [maps.clone().requires_grad_() for _ in range(2)]
        norms.begin_pass("all")
        outputs = [expected.train()(images[0]), found.train()(images[1])]
        for output in outputs:
            output.square().sum().backward()
        norms.begin_pass(None)
        found(torch.zeros(1, 5, 1, 1))  # a pass without images: it must not count, and has too few values
        norms.update()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(images[1].grad, images[0].grad)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    torch.testing.assert_close(found.eval()(maps), expected.eval()(maps))


def test_the_summary_is_the_student_s_own_unless_the_recipe_says_otherwise(write, tmp_path, make_recipe):
    teachers = {"clip": TeacherShape(16, 16, 24, 8), "sam": TeacherShape(None, 20, 48, 8)}
    with torch.device("meta"):
        student = build_student(load_recipe(write(tmp_path)), teachers)
        vit = build_student(load_recipe(make_recipe()), teachers)
    assert isinstance(student.config, ERadioConfig) and student.summary_dim == 64
    assert vit.config.summary_type == "cls" and vit.config.num_cls_tokens == 1
    with pytest.raises(ValueError, match="no CLS tokens"):
        build_student(load_recipe(write(tmp_path), ["student.summary=cls"]), teachers)
    with pytest.raises(ValueError, match="student.config.depth is not a field of ERadioConfig; did you mean depths"):
        build_student(load_recipe(write(tmp_path), ["student.config.depth=3"]), teachers)


def test_it_starts_from_its_checkpoint_and_grows_a_head(finished, write, tmp_path):
    overrides = [
        f"student.checkpoint={finished / 'student'}",
        "teachers.more={type: python, checkpoint: 'helpers.tiny_teachers:PatchTeacher', image_size: 24}",
        "stages.late.teachers=[more]",
        "student.spectral_reparam=true",
    ]
    student = ERadioModel.from_pretrained(train(load_recipe(write(tmp_path), overrides)).student_dir)
    assert student.adaptors.keys() == {"clip", "sam", "more"}


def test_a_plan_counts_it(write, tmp_path, capsys):
    recipe = load_recipe(write(tmp_path))
    plan = make_plan(recipe, processes=2, device=torch.device("cpu"))
    print_plan(recipe, processes=2, gpu="h100")
    assert "student (eradio)" in capsys.readouterr().out
    # twice the sides of stage 1 and 2 cost four times as much; windows grow as well
    low, high = (plan.steps["main"][group].forward_flops for group in ("low", "high"))
    assert 2 * low < high < 4 * low


E_RADIO_RECIPES = sorted((ROOT / "recipes").glob("e_radio_*.yaml"))


@pytest.mark.parametrize("path", E_RADIO_RECIPES, ids=[path.stem for path in E_RADIO_RECIPES])
def test_a_recipe_of_the_project_trains_a_tiny_network(path, tmp_path, image_folder):
    """Two steps of the recipe as it is, but for sizes, teachers, images and processes."""
    shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
    images = [f"data.sources.{name}.path={image_folder}" for name in shipped["data"].get("sources", [])]
    groups = [f"stages.main.groups.{name}" for name in shipped["stages"]["main"].get("groups", [])]
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"student.config={CONFIG}",
        "student.head_hidden_dim=16",
        *(images or [f"data.path={image_folder}"]),
        "data.num_workers=0",
        "data.lanes=4",
        "stages.main.steps=2",
        "stages.main.warmup_steps=1",
        "checkpoints.every_steps=2",
        "log_every_steps=1",
        "tracker=null",
        "mixed_precision=no",  # a process keeps the precision of its first training
    ]
    for where in groups or ["stages.main"]:
        overrides += [f"{where}.resolution=64", f"{where}.batch_size=4", f"{where}.micro_batch_size=2"]
    for name in shipped["teachers"]:
        options = "{width: 20, summary: false}" if name == "sam" else "{width: 16}"
        overrides += [f"teachers.{name}.{key}={value}" for key, value in (*PATCHES, ("options", options))]
    recipe = load_recipe(path, overrides)
    assert recipe.stages["main"].batch_norm == "sync"
    student = ERadioModel.from_pretrained(train(recipe).student_dir)
    shape = ERadioConfig.from_size(shipped["student"]["size"], **CONFIG)
    assert student.adaptors.keys() == shipped["teachers"].keys()
    assert (student.config.neck, student.config.pre_convolution) == (shape.neck, shape.pre_convolution)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
