"""Runs with everything that the recipe offers: they learn, resume to the bit, and leave a plain student."""

import json
import re
import resource
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import forked
from transformers_radio.disk import temporary_path
from transformers_radio.modeling import RadioModel
from transformers_radio.training import load_recipe, stage, train
from transformers_radio.training.distill import build_distillation
from transformers_radio.training.recipe import save_recipe
from transformers_radio.training.student import TeacherShape, build_student
from transformers_radio.training.teachers import load_teacher

ALL_AT_ONCE = [
    "student.spectral_reparam=true",
    "student.gradient_checkpointing=true",
    "student.config.train_window_sizes=[2]",
    "loss.balancing=adaloss",
    "loss.standardization=phi_s",
    "loss.statistics_images=16",
    "loss.grid=smaller",
    "ema_decay=0.9",
    "optimizer.weight_decay=0.05",
    "checkpoints.keep=9",
]


def state(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "training_state" / "model.safetensors")


def cut_back(run, step):
    """As a run that was killed after this step's checkpoint."""
    shutil.rmtree(run / "student")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name[5:13]) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("balancing", ["adaloss", "uncertainty", "amtml_kd"])
def test_a_run_with_everything_resumes_to_the_bit(balancing, make_recipe, tmp_path):
    options = [*ALL_AT_ONCE, f"loss.balancing={balancing}"]
    recipe = make_recipe("whole")
    train(load_recipe(recipe, options))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    cut_back(cut, 6)
    train(load_recipe(make_recipe("cut"), options))
    for name in ("model.safetensors", "ema.safetensors"):
        left, right = (load_file(run / "checkpoints/step-00000012/training_state" / name) for run in (whole, cut))
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    left, right = (load_file(run / "student" / "model.safetensors") for run in (whole, cut))
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    first, second = ((run / "metrics.jsonl").read_text().splitlines() for run in (whole, cut))
    assert [json.loads(line)["clip/features"] for line in first] == [
        json.loads(line)["clip/features"] for line in second
    ]


def test_the_student_of_such_a_run_is_plain_and_speaks_the_teachers_space(make_recipe, tmp_path):
    """Folded: no parametrization is left, and its features are those of the trained model, put back in place."""
    options = ["loss.standardization=phi_s", "loss.statistics_images=24", "student.spectral_reparam=true"]
    recipe = load_recipe(make_recipe(), [*options, "stages.main.steps=40", "optimizer.learning_rate=3e-3"])
    model = RadioModel.from_pretrained(train(recipe).student_dir).eval()
    assert not [key for key in model.state_dict() if "parametrizations" in key]

    shapes = {name: TeacherShape.of(load_teacher(name, spec)) for name, spec in recipe.teachers.items()}
    trained = build_distillation(recipe, "main", build_student(recipe, shapes))
    trained.load_state_dict(state(tmp_path / "run", 40))
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        raw, folded = (one.eval()(images).adaptors["sam"].features for one in (trained.student, model))
    saved = load_file(tmp_path / "run" / "statistics" / "sam.safetensors")
    restored = saved["phi"].float() * raw @ saved["rotation"] + saved["mean"]
    torch.testing.assert_close(folded, restored, rtol=1e-4, atol=1e-4)
    assert (raw - folded).abs().max() > 0.1


def test_a_head_that_rests_is_published_in_its_teachers_space_too(make_recipe, tmp_path):
    """SAM teaches in the first stage only; the student of the second is the trained one, put back in place."""
    options = ["loss.standardization=phi_s", "loss.statistics_images=24", "checkpoints={every_steps: 2, keep: 9}"]
    options += ["stages.main.steps=4", "stages.late={steps: 4, resolution: 32, batch_size: 4, teachers: [clip]}"]
    recipe = load_recipe(make_recipe(), options)
    run, images = tmp_path / "run", torch.rand(3, 3, 32, 32)
    train(recipe)
    saved = load_file(run / "statistics" / "sam.safetensors")
    shapes = {name: TeacherShape.of(load_teacher(name, spec)) for name, spec in recipe.teachers.items()}

    def features(student):
        with torch.no_grad():
            return student.eval()(images).adaptors["sam"].features

    def check(step, folder):
        trained = build_distillation(recipe, "late", build_student(recipe, shapes))
        trained.load_state_dict(state(run, step))
        raw, published = features(trained.student), features(RadioModel.from_pretrained(folder))
        restored = saved["phi"].float() * raw @ saved["rotation"] + saved["mean"]
        torch.testing.assert_close(published, restored, rtol=1e-4, atol=1e-4)
        assert (raw - published).abs().max() > 0.1

    check(6, run / "checkpoints" / "step-00000006")
    check(8, run / "student")
    cut_back(run, 6)  # a start in the second stage
    train(recipe)
    check(8, run / "student")


@pytest.mark.parametrize("value", [0, 0.5])
def test_a_run_may_have_recorded_fields_that_are_no_more(value, make_recipe, tmp_path):
    """At the value that changed nothing; another one would have another student."""
    path = make_recipe()
    save_recipe(load_recipe(path), path)
    recorded = yaml.safe_load(path.read_text())
    recorded["student"]["weight_noise"] = value
    recorded["stages"]["main"]["freeze_trunk_steps"] = 2 * value
    path.write_text(yaml.safe_dump(recorded))
    if value:
        with pytest.raises(ValueError, match="unknown recipe field"):
            load_recipe(path)
    else:
        assert load_recipe(path) == load_recipe(make_recipe())


def test_a_checkpoint_of_an_optimizer_with_more_groups_resumes(make_recipe, tmp_path, monkeypatch):
    """Earlier versions had the trunk's weights in groups of their own."""
    build_optimizer = stage.build_optimizer

    def split(model, recipe, of_stage):
        optimizer = build_optimizer(model, recipe, of_stage)
        heads = {id(weight) for name, weight in model.named_parameters() if name.startswith("student.adaptors.")}
        groups = [
            {
                "params": [weight for weight in group["params"] if (id(weight) in heads) != trunk],
                "weight_decay": group["weight_decay"],
                "trunk": trunk,
            }
            for trunk in (True, False)
            for group in optimizer.param_groups
        ]
        same = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "fused")}
        return torch.optim.AdamW(groups, **same)

    keep = ["checkpoints.keep=9"]
    train(load_recipe(make_recipe("whole"), keep))
    monkeypatch.setattr(stage, "build_optimizer", split)
    train(load_recipe(make_recipe("cut"), keep))
    monkeypatch.undo()
    cut_back(tmp_path / "cut", 6)
    assert (tmp_path / "cut/checkpoints/step-00000006").exists()
    train(load_recipe(make_recipe("cut"), keep))
    whole, cut = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "cut"))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6)


def test_the_average_of_the_weights_is_what_is_published(make_recipe, tmp_path):
    """Against a loop over the checkpoints of every step."""
    train(
        load_recipe(make_recipe(), ["ema_decay=0.5", "checkpoints={every_steps: 1, keep: 99}", "stages.main.steps=5"])
    )
    run, name = tmp_path / "run", "encoder.layer.1.mlp.fc2.weight"
    weights = [state(run, step)[f"student.{name}"] for step in range(1, 6)]
    shares = [0.5**age for age in (4, 3, 2, 1, 0)]
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(shares)
    torch.testing.assert_close(load_file(run / "student" / "model.safetensors")[name], mean)


def test_a_published_average_has_the_averaged_spectral_norms(make_recipe, tmp_path):
    options = ["student.spectral_reparam=true", "ema_decay=0.9", "optimizer.learning_rate=0.02", "checkpoints.keep=9"]
    train(load_recipe(make_recipe(), options))
    folder = tmp_path / "run" / "checkpoints" / "step-00000012"
    student, averages = (load_file(folder / name) for name in ("model.safetensors", "training_state/ema.safetensors"))
    scales = {name: tensor for name, tensor in averages.items() if name.endswith("parametrizations.weight.0.scale")}
    assert len(scales) == 12
    for name, rho in scales.items():
        linear = name.removeprefix("student.").removesuffix("parametrizations.weight.0.scale")
        norm = torch.linalg.svdvals(student[f"{linear}weight"].double())[0].item()
        assert norm == pytest.approx(torch.nn.functional.softplus(rho).item() + 0.05, rel=1e-5), name


def test_a_damaged_checkpoint_is_said_so_and_the_one_before_is_used(make_recipe, tmp_path, caplog):
    recipe = make_recipe("whole")
    train(load_recipe(recipe, ["checkpoints.keep=9"]))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    cut_back(cut, 9)
    weights = cut / "checkpoints" / "step-00000009" / "training_state" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # one bit
    weights.write_bytes(content)
    train(load_recipe(make_recipe("cut"), ["checkpoints.keep=9"]))
    assert "step-00000009 is damaged (training_state/model.safetensors has another checksum)" in caplog.text
    assert (cut / "checkpoints" / "step-00000009.damaged").exists()
    left, right = (load_file(run / "student" / "model.safetensors") for run in (whole, cut))
    assert [key for key in left if not torch.equal(left[key], right[key])] == []

    cut_back(cut, 9)
    for checkpoint in (cut / "checkpoints").glob("step-*[0-9]"):
        (checkpoint / "training_state" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="all checkpoints .* are damaged"):
        train(load_recipe(make_recipe("cut"), ["checkpoints.keep=9"]))


@pytest.mark.parametrize("balancing", ["uncertainty", "adaloss", "amtml_kd"])
def test_a_stage_that_adds_a_teacher_balances_its_own_terms(balancing, make_recipe, tmp_path):
    """The first stage has two terms, the second three, and one learns on where the other ended."""
    stages = ["stages.main={steps: 3, teachers: [clip]}", "stages.high={steps: 3, resolution: 48, batch_size: 4}"]
    options = [*stages, f"loss.balancing={balancing}", "checkpoints.keep=9"]
    model = RadioModel.from_pretrained(train(load_recipe(make_recipe("whole"), options)).student_dir)
    assert set(model.adaptors) == {"clip", "sam"} and model.preferred_resolution == 48
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 3)  # the first stage's last checkpoint: the second begins from it
    train(load_recipe(make_recipe("cut"), options))
    left, right = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "cut"))
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_a_finished_run_that_was_killed_before_it_published_publishes(make_recipe, tmp_path):
    recipe = load_recipe(make_recipe())
    train(recipe)
    run = tmp_path / "run"
    published = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    shutil.rmtree(run / "student")
    temporary_path(run / "student").mkdir()
    assert train(recipe).step == 12
    assert {path.name: path.read_bytes() for path in (run / "student").iterdir()} == published
    assert not temporary_path(run / "student").exists() and "training_state" not in published


def test_a_later_stage_that_cannot_share_out_the_lanes_is_refused_at_once(make_recipe, tmp_path):
    recipe = load_recipe(make_recipe(), ["data.lanes=3", "data.num_workers=2"])
    with pytest.raises(ValueError, match="data.lanes is 3, which gives group all 3 lanes"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_dealt_out_as_before_is_refused_unless_told(make_recipe, tmp_path, caplog):
    train(load_recipe(make_recipe(), ["data.lanes=2"]))
    cut_back(tmp_path / "run", 9)
    with pytest.raises(ValueError, match=r"data.lanes=2 and cannot continue with 3.*restart_data=true"):
        train(load_recipe(make_recipe(), ["data.lanes=3"]))
    assert not (tmp_path / "run" / "student").exists()
    result = train(load_recipe(make_recipe(), ["data.lanes=3", "restart_data=true"]))
    assert result.step == 12 and "begins again" in caplog.text


def train_until_the_disk_is_full(recipe):
    save = stage.save_checkpoint

    def limited(run, *arguments):
        if run.state.step == 6:
            # Like a disk that fills up: no file can grow further.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return save(run, *arguments)

    stage.save_checkpoint = limited
    return forked.train(recipe)


def test_a_disk_that_fills_up_stops_cleanly_and_the_same_command_resumes(make_recipe, tmp_path):
    train(load_recipe(make_recipe("whole")))
    recipe = make_recipe("full")
    stopped = forked.Forked(recipe, target=train_until_the_disk_is_full)
    output, _ = stopped.communicate()
    assert stopped.returncode == 1 and "Traceback" not in output, output[-3000:]
    folder = tmp_path / "full" / "checkpoints"
    assert f"{folder / 'step-00000006'} could not be written" in output
    assert re.search(rf"{folder} has [\d,]+ bytes free.*make room on the disk", output)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000003"]
    train(load_recipe(recipe))
    left, right = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "full"))
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
