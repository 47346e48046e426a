"""Networks of timm in training: stages and groups, batch norm's statistics, resuming, sharding, plan and messages."""

import copy
import json
import re
import time

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from helpers.forked import Forked, finish, fork_group
from helpers.groups_of_processes import FSDP
from transformers_radio import RadioTimmModel
from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.count import make_plan
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.stability.batch_norm import FrozenBatchNorm, StepBatchNorm, replace_batch_norms

# with batch norms and without, and one that is built for a size
RESNET = {"size": "resnetv2_18", "config": {"model_args": {"channels": [8, 8, 16, 16]}}}
CONVNEXT = {"size": "convnext_tiny", "config": {"model_args": {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}}}
STRIDE_16 = {**CONVNEXT, "config": {**CONVNEXT["config"], "feature_stride": 16}}
SWIN = {
    "size": "swinv2-2m",
    "config": {
        "model_args": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
        "image_size": 64,
    },
}
STEPS = 4
CHANGES = {
    "stages": {
        "main": {
            "steps": STEPS,
            "groups": {
                "low": {"teachers": ["clip"], "resolution": 32, "batch_size": 4, "micro_batch_size": 2},
                "high": {"teachers": ["sam"], "resolution": 64, "batch_size": 4, "micro_batch_size": 2, "rate": 0.5},
            },
        },
    },
    # a gradient that is zero except for rounding must not become a whole step of Adam
    "loss": {"balancing": "uncertainty"},
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-3},
    "ema_decay": 0.9,
    "checkpoints": {"every_steps": 1, "keep": 9},
    "log_every_steps": 1,
}


@pytest.fixture
def make_timm_recipe(tmp_path, recipe_text, image_folder):
    def make(student, name="run"):
        return write_recipe(tmp_path, recipe_text, image_folder, student, name)

    return make


def write_recipe(folder, recipe_text, images, student, name="run"):
    recipe = yaml.safe_load(recipe_text.format(output=folder / name, images=images))
    recipe |= CHANGES
    recipe["student"] = {"type": "radio_timm", "summary": "mean", **student}
    recipe["data"]["lanes"] = 4
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


def training_state(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "training_state" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe_text, image_folder):
    """A run with batch norms that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(load_recipe(write_recipe(folder, recipe_text, image_folder, RESNET)))
    return folder / "run"


@pytest.fixture(scope="module")
def finished_convnext(tmp_path_factory, recipe_text, image_folder):
    """A run without batch norms, with features from before the last stage, which only the summary reaches."""
    folder = tmp_path_factory.mktemp("finished_convnext")
    train(load_recipe(write_recipe(folder, recipe_text, image_folder, STRIDE_16)))
    return folder / "run"


def test_it_trains_in_groups(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert ["sam/features" in line for line in lines] == [True, False] * 2
    assert lines[-1]["clip/features"] < lines[0]["clip/features"]
    student = RadioTimmModel.from_pretrained(finished / "student")
    assert (student.config.timm_model, student.preferred_resolution) == ("resnetv2_18", 32)


def test_batch_norm_s_statistics_are_averaged_like_the_weights_around_them(finished):
    exported, names = weights(finished / "student"), []
    for name, found in exported.items():
        if name.endswith(("running_mean", "running_var")):
            names.append(name)
            steps = [training_state(finished, step)[f"student.{name}"] for step in range(1, STEPS + 1)]
            shares = [0.9**age for age in reversed(range(STEPS))]
            average = sum(share * step for share, step in zip(shares, steps, strict=True)) / sum(shares)
            torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
            assert not torch.equal(found, training_state(finished, STEPS)[f"student.{name}"])
    assert len(names) == 2 * 17


def test_killed_and_started_again_it_ends_with_the_same_bits(finished, make_timm_recipe, tmp_path):
    recipe = make_timm_recipe(RESNET)
    process = Forked(recipe, CUDA_VISIBLE_DEVICES="")
    while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    again = Forked(recipe, CUDA_VISIBLE_DEVICES="")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    for read in (lambda run: weights(run / "student"), lambda run: training_state(run, STEPS)):
        expected, found = read(finished), read(tmp_path / "run")
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_train_the_student_of_one(environment, finished_convnext, make_timm_recipe, tmp_path):
    """Each with a group of its own; that of `sam` reaches neither the last stage nor the norm behind it."""
    finish(fork_group(2, make_timm_recipe(STRIDE_16), **environment))
    expected, found = weights(finished_convnext / "student"), weights(tmp_path / "run" / "student")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_norm_s_statistics_do_not_depend_on_the_number_of_processes(finished, make_timm_recipe, tmp_path):
    """timm's own kind, with an activation in it; each process has a group of its own."""
    finish(fork_group(2, make_timm_recipe(RESNET)))
    expected, found = weights(finished / "student"), weights(tmp_path / "run" / "student")
    for name in expected:
        # steps of up to 1e-2 on gradients that differ in their last bits; variances are up to 10
        torch.testing.assert_close(
            found[name], expected[name], rtol=2e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["local", "frozen"])
@torch.no_grad()
def test_batch_norms_in_training_compute_what_timm_s_do(kind):
    network = timm.create_model("resnetv2_18", num_classes=0, channels=[8, 8, 16, 16])
    images = torch.rand(4, 3, 64, 64)
    expected = network.train(kind == "local")(images)
    names = list(network.state_dict())
    replaced = copy.deepcopy(network).train()
    replace_batch_norms(replaced, kind)
    assert {type(part) for part in replaced.modules() if isinstance(part, torch.nn.BatchNorm2d)} < {
        StepBatchNorm,
        FrozenBatchNorm,
    }
    torch.testing.assert_close(replaced(images), expected)
    assert list(replaced.state_dict()) == names


@pytest.mark.parametrize(
    "option",
    ["gradient_checkpointing=true", "spectral_reparam=true"],
)
def test_what_training_does_to_blocks(option, make_timm_recipe, tmp_path, finished_convnext):
    train(load_recipe(make_timm_recipe(STRIDE_16), [f"student.{option}"]))
    expected, found = weights(finished_convnext / "student"), weights(tmp_path / "run" / "student")
    assert expected.keys() == found.keys()
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    assert same == option.startswith("gradient")


def test_a_network_of_one_size_trains_at_that_size(make_timm_recipe):
    recipe = make_timm_recipe(SWIN)
    with pytest.raises(ValueError, match="low.resolution is 32; the student is built for images of 64 pixels alone"):
        print_plan(load_recipe(recipe))
    student = RadioTimmModel.from_pretrained(
        train(load_recipe(recipe, ["stages.main.groups.low.resolution=64"])).student_dir
    )
    assert student(torch.rand(1, 3, 64, 64)).grid == (2, 2)


def test_it_starts_from_a_network_s_own_weights(make_timm_recipe, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnetv2_18", **RESNET["config"]["model_args"])
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    model = RadioTimmModel.from_timm(
        "resnetv2_18", str(tmp_path / "weights.safetensors"), model_args=RESNET["config"]["model_args"]
    )
    model.save_pretrained(tmp_path / "start")
    options = ["optimizer.learning_rate=1e-9", "ema_decay=null", f"student.checkpoint={tmp_path / 'start'}"]
    recipe = load_recipe(make_timm_recipe({"summary": "cls_per_teacher"}), options)  # the default
    print_plan(recipe)
    student = RadioTimmModel.from_pretrained(train(recipe).student_dir)
    assert set(student.adaptors) == {"clip", "sam"}
    for name, weight in student.network.named_parameters():
        torch.testing.assert_close(weight, network.get_parameter(name), rtol=0, atol=1e-6)


def test_a_plan_counts_it(make_timm_recipe, capsys):
    recipe = load_recipe(make_timm_recipe(RESNET))
    print_plan(recipe, processes=2, gpu="h100")
    text = capsys.readouterr().out
    assert "student (radio_timm): 0.04 M parameters" in text and "8 blocks, summary 16 wide, features 16 wide" in text
    plan = make_plan(
        load_recipe(make_timm_recipe(RESNET), ["loss.balancing=naive"]), processes=1, device=torch.device("cpu")
    )
    network = timm.create_model("resnetv2_18", num_classes=0, **RESNET["config"]["model_args"]).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 32, 32))
    # the heads of clip, 20 wide within: of the features at one position, and of the summary
    heads = 2 * 2 * (16 * 20 + 20 * 16)
    assert plan.steps["main"]["low"].forward_flops == counter.get_total_flops() + heads


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.size=resnetv2_19"], "has no network 'resnetv2_19'; did you mean resnetv2_18"),
        (["student.summary=cls"], "summary is 'cls', expected \"mean\""),
        (["student.config.feature_stride=12"], "the stages of resnetv2_18 have the strides 2, 4, 8, 16, 32"),
        (["student.config.image_size=64"], "resnetv2_18 takes images of any size; leave it out"),
        (["student.config.model_args={layer: 3}"], "cannot build resnetv2_18"),
        (["student.config.model_args={pretrained: true}"], "model_args has pretrained; leave it out"),
        (["student.spectral_reparam=true"], "student.spectral_reparam acts on the Linears in a student's blocks"),
        (["student.config.patch_size=8"], "patch_size is 8, but resnetv2_18"),
        (
            ["student.config.timm_modl=x"],
            "student.config.timm_modl is not a field of RadioTimmConfig; did you mean timm",
        ),
    ],
)
def test_what_it_cannot_do_is_said_before_the_first_step(overrides, message, make_timm_recipe, tmp_path):
    for attempt in (print_plan, train):
        with pytest.raises(ValueError, match=re.escape(message)):
            attempt(load_recipe(make_timm_recipe(RESNET), overrides))
    assert not (tmp_path / "run").exists()
