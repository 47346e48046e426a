"""Several gloo processes against one: the same update whatever their number, engine or interruptions."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from helpers import forked
from helpers.forked import fork_group
from helpers.groups_of_processes import FSDP, children, run, start
from transformers_radio.training import load_recipe, train
from transformers_radio.training import teachers as placement
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.run.signals import StopSignal
from transformers_radio.training.stage import Stage
from transformers_radio.training.teachers import build_teachers

# Two groups, as the paper's second stage: SAM sees fewer images, at a higher student resolution, every second step.
GROUPS = [
    "stages.main={steps: 4, warmup_steps: 1, resolution: 0, groups: {"
    "low: {teachers: [clip], resolution: 32, batch_size: 8, micro_batch_size: 2},"
    "high: {teachers: [sam], resolution: 48, batch_size: 4, micro_batch_size: 2, rate: 0.5}}}",
    "student.config.cpe_sampling=false",  # crops of the position table are drawn by each process for itself
    "student.config.pos_dropout=0",
    "student.config.train_window_sizes=[2, 3]",
    "student.config.train_window_probability=0.5",
    "data.lanes=4",
    # A gradient that is zero but for rounding must not become a whole step of Adam.
    "optimizer.eps=1e-3",
    "checkpoints={every_steps: 2, keep: 9}",
    "log_every_steps=1",
]


def weights(folder):
    return load_file(folder / "model.safetensors")


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_close(left, right, atol):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, image_folder, recipe_text):
    """One process that runs all groups in turn."""
    folder = tmp_path_factory.mktemp("alone")
    path = folder / "recipe.yaml"
    path.write_text(recipe_text.format(output=folder / "run", images=image_folder))
    train(load_recipe(path, GROUPS))
    return folder / "run"


@pytest.fixture(scope="module")
def half_alone(tmp_path_factory, image_folder, recipe_text):
    """As `alone`, in bfloat16; in another process, as a process has one precision."""
    folder = tmp_path_factory.mktemp("half_alone")
    path = folder / "recipe.yaml"
    path.write_text(recipe_text.format(output=folder / "run", images=image_folder))
    run(1, path, *GROUPS, "mixed_precision=bf16")
    return folder / "run"


def test_several_processes_write_to_a_tracker_and_publish(make_recipe, tmp_path):
    """Closing the tracker must not end the group of the processes, which publish the student together."""
    run(2, make_recipe("tracked"), *GROUPS, "tracker=tensorboard")
    assert (tmp_path / "tracked" / "student" / "model.safetensors").exists()
    assert list((tmp_path / "tracked" / "tracker").rglob("events*"))


@pytest.mark.parametrize(("processes", "engine"), [(2, {}), (4, {}), (2, FSDP), (4, FSDP)])
def test_the_update_of_several_processes_is_that_of_one(processes, engine, alone, make_recipe, tmp_path):
    recipe = make_recipe("several")
    run(processes, recipe, *GROUPS, **engine)
    several = tmp_path / "several"
    for step in (2, 4):
        checkpoint = f"checkpoints/step-{step:08d}"
        assert_close(weights(alone / checkpoint), weights(several / checkpoint), atol=1e-6)
    for one, many in zip(metrics(alone), metrics(several), strict=True):
        assert one.keys() == many.keys()
        for key in one.keys() - {"images_per_second", "data_wait", "stage"}:
            assert one[key] == pytest.approx(many[key], abs=2e-5), (key, one["step"])
    # Half of the steps have the second group.
    assert ["sam/features" in line for line in metrics(several)] == [True, False, True, False]


def train_and_look_at_the_blocks(*arguments):
    train_step = Stage.train_step

    def look(stage):
        blocks = stage.distillation.student.blocks
        assert len(blocks) == 2 and all(isinstance(module, FSDPModule) for module in (*blocks, stage.model))
        train_step(stage)

    Stage.train_step = look
    return forked.train(*arguments)


def test_the_blocks_that_the_student_names_are_sharded_one_by_one(make_recipe):
    """No environment or YAML file names a class."""
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in FSDP
    run(
        2,
        make_recipe(),
        "stages.main.steps=2",
        "stages.main.warmup_steps=1",
        target=train_and_look_at_the_blocks,
        **FSDP,
    )


@pytest.mark.parametrize("placement", ["offloaded", "sharded"])
def test_teachers_teach_the_same_wherever_their_weights_are(placement, make_recipe, tmp_path):
    """The quickstart's three real architectures, by two processes."""
    checkpoints = {"clip": ("open_clip", "clip"), "dinov2": ("transformers", "dinov2")}
    checkpoints["sam"] = ("segment_anything", "sam/sam.pth")
    for name in ("device", placement):
        path = make_recipe(name)
        recipe = yaml.safe_load(path.read_text())
        recipe["teachers"] = {
            teacher: {"type": kind, "checkpoint": f"${{package:quickstart/teachers/{file}}}", "placement": name}
            for teacher, (kind, file) in checkpoints.items()
        }
        path.write_text(yaml.safe_dump(recipe))
        run(2, path, "stages.main.steps=2", "stages.main.warmup_steps=1", "optimizer.eps=1e-3")
    assert_close(weights(tmp_path / "device" / "student"), weights(tmp_path / placement / "student"), atol=1e-6)


@pytest.mark.parametrize("balancing", ["uncertainty", "amtml_kd"])
def test_everything_at_once_on_sharded_weights_is_that_of_one_process(balancing, make_recipe, tmp_path):
    options = [
        *GROUPS,
        f"loss.balancing={balancing}",
        "loss.standardization=phi_s",
        "loss.statistics_images=24",
        "student.spectral_reparam=true",
        "student.gradient_checkpointing=true",
        "ema_decay=0.9",
    ]
    train(load_recipe(make_recipe("one"), options))
    run(2, make_recipe("two"), *options, **FSDP)
    for name in ("student", "checkpoints/step-00000004/training_state"):
        assert_close(weights(tmp_path / "one" / name), weights(tmp_path / "two" / name), atol=1e-6)


def test_a_checkpoint_resumes_with_other_processes_and_another_engine(alone, make_recipe, tmp_path):
    """Two processes with DDP to step 2, then FSDP2, then one process: as if nothing had changed."""
    recipe = make_recipe("moved")
    moved = tmp_path / "moved"
    run(2, recipe, *GROUPS)
    shutil.rmtree(moved / "student")
    shutil.rmtree(moved / "checkpoints" / "step-00000004")
    output = run(4, recipe, *GROUPS, **FSDP)
    assert "from step 2 of 4" in output
    assert_close(weights(alone / "student"), weights(moved / "student"), atol=1e-6)
    shutil.rmtree(moved / "student")
    shutil.rmtree(moved / "checkpoints" / "step-00000004")
    train(load_recipe(recipe, GROUPS))
    assert_close(weights(alone / "student"), weights(moved / "student"), atol=1e-6)


def test_a_dead_process_stops_all_and_the_same_command_resumes_to_the_bit(make_recipe, tmp_path):
    options = ["stages.main.steps=60", "checkpoints.every_steps=5", "data.lanes=2"]
    run(2, make_recipe("reference"), *options)
    recipe, checkpoints = make_recipe("killed"), tmp_path / "killed" / "checkpoints"

    def wait_for_new_checkpoint(process):
        before = set(checkpoints.glob("step-*[0-9]"))
        while process.poll() is None and not set(checkpoints.glob("step-*[0-9]")) - before:
            time.sleep(0.01)

    group = fork_group(2, recipe, *options)
    wait_for_new_checkpoint(group[0])
    for process in group:  # the one that writes, and then the other, as a launcher does
        process.kill()
        process.communicate()
    launcher = start(2, recipe, *options)
    wait_for_new_checkpoint(launcher)
    os.kill(children(launcher)[1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=600)
    assert launcher.returncode != 0, output
    run(2, recipe, *options)
    left, right = weights(tmp_path / "reference" / "student"), weights(tmp_path / "killed" / "student")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_every_process_builds_only_the_teachers_that_it_serves(make_recipe, monkeypatch):
    recipe = load_recipe(make_recipe(), GROUPS)
    loaded = []
    load_teacher = placement.load_teacher
    monkeypatch.setattr(placement, "load_teacher", lambda name, spec: loaded.append(name) or load_teacher(name, spec))
    for rank, processes, expected in ((0, 2, ["clip"]), (1, 2, ["sam"]), (3, 4, ["sam"]), (0, 1, ["clip", "sam"])):
        groups = {"main": stage_groups("main", recipe.stages["main"], list(recipe.teachers), rank, processes)}
        assert list(build_teachers(recipe, groups)) == expected
        assert loaded == expected
        loaded.clear()


def test_groups_that_count_by_their_share_do_so_by_two_processes_as_by_one(make_recipe, tmp_path):
    options = [*GROUPS, "stages.main.weighting=per_rank", "stages.main.groups.low.share=3"]
    train(load_recipe(make_recipe("one"), options))
    run(2, make_recipe("two"), *options)
    assert_close(weights(tmp_path / "one" / "student"), weights(tmp_path / "two" / "student"), atol=1e-6)
    # 8 images of low and 4 of high: a share of 3 : 1 is not 2 : 1, which per_image would be
    train(load_recipe(make_recipe("by_image"), options[:-2]))
    left, right = (weights(tmp_path / name / "student") for name in ("one", "by_image"))
    assert max((left[name] - right[name]).abs().max() for name in left) > 1e-4


@pytest.mark.parametrize("engine", [{}, FSDP])
def test_two_processes_in_half_precision_are_close_to_one(engine, half_alone, make_recipe, tmp_path):
    """bfloat16 has 8 bits. Losses agree to half a percent, and how far the weights have moved to a twentieth."""
    run(2, make_recipe("two"), *GROUPS, "mixed_precision=bf16", **engine)
    one, two = weights(half_alone / "student"), weights(tmp_path / "two" / "student")
    before = weights(half_alone / "checkpoints" / "step-00000002")
    for name in (name for name in one if one[name].is_floating_point()):
        # Next to nothing moves the biases of the keys, which change no attention.
        assert (one[name] - two[name]).norm() <= 0.05 * (one[name] - before[name]).norm() + 1e-6, name
    for left, right in zip(metrics(half_alone), metrics(tmp_path / "two"), strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"images_per_second", "data_wait", "stage"}:
            assert left[key] == pytest.approx(right[key], rel=5e-3), (key, left["step"])
    # Losses are float32: those of 8 images, each rounded to bfloat16, would be multiples of 2**-13
    assert metrics(tmp_path / "two")[0]["clip/features"] * 2**13 % 1 != 0


def test_a_position_of_two_processes_resumes_in_one_with_the_same_passes(make_recipe, tmp_path):
    options = [*GROUPS[1:], "stages.main.steps=4", "stages.main.batch_size=8"]
    recipe = make_recipe("moved")
    run(2, recipe, *options)
    shutil.copytree(tmp_path / "moved", tmp_path / "whole")
    shutil.rmtree(tmp_path / "moved" / "student")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-00000004")
    with pytest.raises(ValueError, match="had 4 images in a pass .* has 8 now.*micro_batch_size=4.* divides 2"):
        train(load_recipe(recipe, options))
    train(load_recipe(recipe, [*options, "stages.main.micro_batch_size=4"]))
    assert_close(weights(tmp_path / "whole" / "student"), weights(tmp_path / "moved" / "student"), atol=1e-6)


def test_sigterm_to_the_launcher_saves_and_the_same_command_resumes(make_recipe, tmp_path, capsys):
    options = ["stages.main.steps=400", "checkpoints.every_steps=1000", "log_every_steps=1", "data.lanes=2"]
    options += ["stages.main.micro_batch_size=2"]
    recipe, stopped = make_recipe("stopped"), tmp_path / "stopped"
    process = start(2, recipe, *options)
    while process.poll() is None and not ((stopped / "metrics.jsonl").exists() and metrics(stopped)):
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output  # the launcher's own, whatever its processes end with
    assert "stopped by a signal at step" in output, output
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name[5:]) < 400
    assert train(load_recipe(recipe, options)).step == 400  # by one process
    assert f"from step {int(checkpoint.name[5:])} of 400" in capsys.readouterr().out


def test_a_signal_that_comes_while_the_processes_talk_counts_in_the_next_step():
    def interrupted(told):
        signal.raise_signal(signal.SIGTERM)
        return told

    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=interrupted)
    with StopSignal() as stop:
        assert not stop.agreed(accelerator) and stop.number is None
        accelerator.gather = torch.clone
        assert stop.agreed(accelerator) and stop.number == signal.SIGTERM
