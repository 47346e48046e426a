"""Whole runs, as users start them: finished, continued, killed, stopped by a signal, refused."""

import importlib
import json
import random
import shutil
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from transformers_radio.cli import app
from transformers_radio.disk import temporary_path
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import digest_weights
from transformers_radio.training import load_recipe, stage, train
from transformers_radio.training.__main__ import main
from transformers_radio.training.teachers import load_teacher


def weights(run):
    return load_file(run / "student" / "model.safetensors")


def assert_same_weights(run, other):
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture
def finished(make_recipe, tmp_path):
    """A run that nothing disturbed."""
    train(load_recipe(make_recipe("undisturbed")))
    return tmp_path / "undisturbed"


def test_a_run_learns_and_leaves_a_model_that_loads(make_recipe, tmp_path):
    result = train(load_recipe(make_recipe(), ["stages.main.steps=60", "optimizer.learning_rate=3e-3"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    for term in ("clip/summary", "clip/features", "sam/features"):
        first, last = (sum(line[term] for line in part) / 5 for part in (lines[:5], lines[-5:]))
        assert last < 0.8 * first, (term, first, last)
    assert "sam/summary" not in lines[0]
    spec = load_recipe(make_recipe()).teachers["clip"]
    adaptor = RadioModel.from_pretrained(result.student_dir).config.adaptors["clip"]
    assert adaptor["teacher"] == "python:helpers.tiny_teachers:PatchTeacher"
    assert adaptor["teacher_weights"] == digest_weights(load_teacher("clip", spec))
    assert lines[0]["loss"] == pytest.approx(sum(v for k, v in lines[0].items() if "/" in k), rel=1e-5)

    model = RadioModel.from_pretrained(result.student_dir).eval()
    output = model(torch.rand(2, 3, 32, 32))
    assert output.adaptors["clip"].summary.shape == (2, 16) and output.adaptors["clip"].features.shape == (2, 16, 16)
    assert output.adaptors["sam"].summary is None and output.adaptors["sam"].features.shape == (2, 16, 20)
    native = AutoModel.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000060")
    assert type(native).__module__.startswith("transformers.")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(native.eval()(images).summary, model(images).summary)


def test_only_the_last_checkpoints_are_kept(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(finished, make_recipe, tmp_path):
    train(load_recipe(make_recipe("again")))
    assert_same_weights(finished, tmp_path / "again")
    train(load_recipe(make_recipe("other"), ["seed=1"]))
    assert not torch.equal(*(weights(run)["encoder.layer.0.mlp.fc1.weight"] for run in (finished, tmp_path / "other")))


def test_a_finished_run_is_left_alone(finished, make_recipe):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = train(load_recipe(make_recipe("undisturbed")))
    assert result.step == 12 and result.student_dir == finished / "student"
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(number, finished, make_recipe, start_training, tmp_path):
    recipe = make_recipe("stopped")
    process = start_training(recipe)
    _wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(number)
    output, _ = process.communicate()
    assert "Traceback" not in output, output
    if process.returncode != 0:  # else it was quicker than the signal
        assert process.returncode == 128 + number and "run the same command again" in output
        assert list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    train(load_recipe(recipe))
    assert_same_weights(finished, tmp_path / "stopped")


def test_a_changed_recipe_does_not_continue_a_run_unless_told(finished, make_recipe):
    recipe = make_recipe("undisturbed")
    with pytest.raises(FileExistsError, match=r"stages.main.steps \(12 there, 14 here\)"):
        train(load_recipe(recipe, ["stages.main.steps=14"]))
    assert (finished / "student").exists()
    result = train(load_recipe(recipe, ["stages.main.steps=14", "overwrite=true"]))
    assert result.step == 14


def test_a_folder_of_other_files_is_not_touched(make_recipe, tmp_path):
    recipe = make_recipe("thesis")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no run: it has chapter1.txt, but no run.yaml"):
        train(load_recipe(recipe, ["overwrite=true"]))
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_users_files_with_the_names_of_a_runs_are_not_touched(make_recipe, tmp_path):
    recipe = make_recipe("mine")
    files = [tmp_path / "mine" / name for name in ("checkpoints/best.pt", "metrics.jsonl", "tracker/log")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    for overrides in ([], ["overwrite=true"]):
        with pytest.raises(FileExistsError, match="it has checkpoints, metrics.jsonl, tracker, but no run.yaml"):
            train(load_recipe(recipe, overrides))
    assert [file.read_text() for file in files] == ["years of work"] * 3


def test_overwriting_deletes_what_the_run_wrote_and_only_after_all_checks(finished, make_recipe):
    mine = [finished / name for name in ("notes.txt", "student.tmp", "metrics.jsonl.tmp")]
    for path in mine:
        path.write_text("mine")
    recipe = make_recipe("undisturbed")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for overrides, message in (
        (["teachers.clip.checkpoint=helpers.tiny_teachers:Nobody"], "teachers.clip"),
        (["student.attn_implementation=flash_attention_2"], "stages.main cannot be built: .*[Ff]lash"),
        (["student.spectral_reparam=true", "student.config.initializer_range=1e-9"], "start from larger weights"),
        (["tracker=aim"], "tracker is 'aim', which is not installed"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_recipe(recipe, ["overwrite=true", *overrides]))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert train(load_recipe(recipe, ["overwrite=true", "stages.main.steps=4"])).step == 4
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("deletion", [1, 2])
def test_an_overwrite_that_is_killed_while_it_deletes_can_be_started_again(
    deletion, finished, make_recipe, monkeypatch
):
    mine = [finished / name for name in ("notes.txt", "student.tmp", "metrics.jsonl.tmp")]
    for path in mine:
        path.write_text("mine")
    recipe = make_recipe("undisturbed")
    rmtree, calls = shutil.rmtree, []

    def killed(path):
        calls.append(path)
        if len(calls) < deletion:
            return rmtree(path)
        next(path.rglob("model.safetensors")).unlink()  # half of the folder is gone
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        train(load_recipe(recipe, ["overwrite=true"]))
    student = finished / "student"
    assert not student.exists() or (student / "model.safetensors").exists()
    assert train(load_recipe(recipe, ["overwrite=true", "stages.main.steps=4"])).step == 4
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert (finished / "notes.txt").read_text() == "mine" and not temporary_path(finished / "student").exists()


def test_ctrl_c_before_the_first_step_is_one_line(make_recipe, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("transformers_radio.training.train"), "build_teachers", interrupted)
    recipe = str(make_recipe())
    assert main([recipe]) == 130
    with pytest.raises(SystemExit) as ended:
        app(["train", recipe])  # transformers-radio
    assert ended.value.code == 130
    assert capsys.readouterr().err.count("stopped at once") == 2


def test_a_library_that_is_missing_is_one_line(make_recipe, monkeypatch):
    def missing(*_):
        raise ImportError("pip install something")

    monkeypatch.setattr(importlib.import_module("transformers_radio.training.train"), "build_teachers", missing)
    with pytest.raises(SystemExit, match="error: pip install something"):
        main([str(make_recipe())])


def test_a_start_that_failed_or_was_killed_early_does_not_block_the_next(make_recipe, tmp_path):
    recipe = make_recipe()
    (tmp_path / "run").mkdir()
    temporary_path(tmp_path / "run" / "run.yaml").write_text("half a rec")
    with pytest.raises(ValueError, match="make it a multiple of 3"):
        train(load_recipe(recipe, ["stages.main.micro_batch_size=3"]))
    assert train(load_recipe(recipe, ["stages.main.steps=4"])).step == 4


def test_two_processes_do_not_train_in_one_folder(make_recipe, tmp_path):
    from transformers_radio.training.run.folder import open_run

    recipe = load_recipe(make_recipe())
    with open_run(recipe, None):
        with pytest.raises(FileExistsError, match="another process is training"):
            train(recipe)
    assert train(recipe).step == 12


def test_workers_and_skip_share_may_change_between_starts(make_recipe, start_training, finished, tmp_path):
    recipe = make_recipe("moved")
    process = start_training(recipe)
    _wait_for_step(tmp_path / "moved", 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    train(load_recipe(recipe, ["data.num_workers=1", "data.max_skipped_share=0.5"]))
    assert_same_weights(finished, tmp_path / "moved")


def test_a_loss_that_is_not_finite_names_teacher_and_head_and_keeps_the_checkpoint(make_recipe, tmp_path):
    # One call in the check before training, three good steps, then NaN.
    recipe = load_recipe(make_recipe(), ["teachers.sam.options.broken=4"])
    with pytest.raises(FloatingPointError, match="step 4: sam/features = nan"):
        train(recipe)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_fp16_is_refused_where_it_would_be_float32(make_recipe, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is one of the process
    try:
        with pytest.raises(ValueError, match="no gradient scaler for device 'cpu'; set mixed_precision=bf16 or no"):
            train(load_recipe(make_recipe(), ["mixed_precision=fp16"]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_is_not_stepped_on(make_recipe, monkeypatch, tmp_path):
    norms = iter([1.0, 1.0, 1.0, float("nan")])
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda *_, **__: torch.tensor(next(norms)))
    with pytest.raises(FloatingPointError, match="step 4: gradient norm = nan"):
        train(load_recipe(make_recipe()))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


STAGES = [
    "stages.main.steps=3",
    "stages.main.teachers=[clip]",
    "stages.high={steps: 5, resolution: 48, batch_size: 4, micro_batch_size: 2}",
    "data.lanes=1",
    "checkpoints={every_steps: 1, keep: 9}",
]


def test_a_second_stage_resumes_with_the_images_and_resumes_to_the_bit(make_recipe, tmp_path, monkeypatch):
    """The second stage starts accumulating at an odd number of passes, and its images follow those of the first."""
    seen = []
    to_device = stage.to_device
    monkeypatch.setattr(stage, "to_device", lambda batch, device: seen.extend(batch.keys) or to_device(batch, device))
    train(load_recipe(make_recipe("whole"), STAGES))
    assert len(seen) == 32 and len(set(seen[:24])) == 24  # 24 images: none comes twice before all have come once

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "student")
    for step in range(6, 9):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    train(load_recipe(make_recipe("cut"), STAGES))
    assert_same_weights(tmp_path / "whole", cut)


def test_skipped_images_are_counted_over_stages(make_recipe, image_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    for index in (0, 1, 2):
        (broken / "part0" / f"broken{index}.png").write_bytes(b"not an image")
    recipe = make_recipe(images=broken)
    result = train(load_recipe(recipe, [*STAGES, "data.max_skipped_share=0.5", "data.shuffle_window=1"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["skipped"] for line in lines]
    assert counts == sorted(counts) and sum(result.skipped.values()) == counts[-1] == 3


def test_the_student_of_a_checkpoint_learns_from_a_new_teacher(finished, make_recipe, tmp_path):
    start = f"student.checkpoint={finished / 'student'}"
    checkpoint = "helpers.tiny_teachers:PatchTeacher"
    new = f"teachers.new={{type: python, checkpoint: '{checkpoint}', image_size: 24, options: {{width: 12}}}}"

    recipe = make_recipe("more")  # without SAM, whose adaptor stays as it is
    text = recipe.read_text()
    recipe.write_text(text[: text.index("  sam:")] + text[text.index("data:") :])
    options = [new, start, "stages.main.steps=4", "checkpoints.every_steps=2"]
    before = RadioModel.from_pretrained(finished / "student")
    model = RadioModel.from_pretrained(train(load_recipe(recipe, options)).student_dir)
    assert set(model.adaptors) == {"clip", "sam", "new"} and model.config.adaptors["new"]["summary_token"] == 1
    assert model.summary_idxs.tolist() == [0, 1] and model.preferred_resolution == 32
    tables = [one.embeddings.cls_register_token for one in (before, model)]
    assert len(tables[1]) == len(tables[0]) + 1 and not torch.equal(tables[1][0], tables[1][1])  # no twins any more
    for name, parameter in before.adaptors.named_parameters():
        assert torch.equal(parameter, model.adaptors.get_parameter(name)) == name.startswith("sam."), name

    more, cut = tmp_path / "more", tmp_path / "whole"
    shutil.copytree(more, cut)
    shutil.rmtree(more / "student")
    shutil.rmtree(more / "checkpoints" / "step-00000004")
    train(load_recipe(recipe, options))
    assert_same_weights(cut, more)
    with pytest.raises(ValueError, match="teachers.clip needs 8"):
        train(load_recipe(make_recipe("other"), [start, "teachers.clip.options.width=8"]))
    with pytest.raises(ValueError, match="student.summary is 'mean'; expected none"):
        load_recipe(make_recipe("other"), [start, "student.summary=mean"])


def test_the_students_image_processor_gives_what_it_was_trained_on(finished):
    processor = AutoImageProcessor.from_pretrained(finished / "student", trust_remote_code=True)
    pixels = processor(Image.new("RGB", (70, 50)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.main.resolution=33", "multiples of 8 up to 64, the nearest is 32"),
        ("stages.main.resolution=128", "multiples of 8 up to 64, the nearest is 64"),
        ("teachers.clip.checkpoint=helpers.tiny_teachers:Nobody", "teachers.clip .* has no 'Nobody'"),
        ("teachers.clip.type=clipp", "teachers.clip.type is .clipp."),
        ("teachers.sam.feature_weight=0", "teachers.sam teaches nothing"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
        ("stages.main.micro_batch_size=3", "make it a multiple of 3"),
    ],
)
def test_what_can_fail_fails_before_the_first_step(override, message, make_recipe, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(load_recipe(make_recipe(), [override]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_is_seen_before_training(make_recipe, monkeypatch, tmp_path):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("transformers_radio.training.checks.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0 MB free and the run needs .* lower checkpoints.keep"):
        train(load_recipe(make_recipe()))
    assert not (tmp_path / "run").exists()


def test_accumulated_passes_equal_one_large_pass(make_recipe, tmp_path):
    fixed = ["student.config.cpe_sampling=false", "student.config.pos_dropout=0", "stages.main.steps=3"]
    train(load_recipe(make_recipe("whole"), fixed))
    train(load_recipe(make_recipe("parts"), [*fixed, "stages.main.micro_batch_size=2", "data.lanes=1"]))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=2e-5)


def _wait_for_step(run, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and any(json.loads(line)["step"] >= step for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.02)


def test_ten_kills_at_random_moments_change_nothing(make_recipe, start_training, tmp_path):
    """SIGKILL whenever: loading, stepping, writing a checkpoint, deleting an old one."""
    options = ["stages.main.steps=400", "checkpoints.every_steps=7", "data.num_workers=1"]
    reference = start_training(make_recipe("reference"), *options)
    started = time.monotonic()
    output, _ = reference.communicate()
    assert reference.returncode == 0, output
    duration = time.monotonic() - started
    recipe = make_recipe("killed")
    rng = random.Random(0)
    kills = resumed = 0
    while True:
        process = start_training(recipe, *options)
        if kills < 10:
            before = {path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")}
            # Most of a short run is start-up: wait for the loop, then any moment of a tenth of the whole.
            _wait_for_new_checkpoint(tmp_path / "killed", before, process)
            time.sleep(rng.uniform(0, duration / 20))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        output, _ = process.communicate()
        resumed += "continuing" in output
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert kills == 10 and resumed == 10
    assert_same_weights(tmp_path / "reference", tmp_path / "killed")
    reference_lines, killed_lines = (
        [json.loads(line)["step"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("reference", "killed")
    )
    assert killed_lines == reference_lines


def _wait_for_new_checkpoint(run, before, process):
    while process.poll() is None:
        if {path.name for path in (run / "checkpoints").glob("step-*[0-9]")} - before:
            return
        time.sleep(0.01)


def test_tensorboard_shows_every_step_once_after_a_kill(make_recipe, start_training, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe("killed")
    options = ["tracker=tensorboard", "checkpoints.every_steps=6", "log_every_steps=1", "stages.main.steps=40"]
    process = start_training(recipe, *options)
    _wait_for_step(tmp_path / "killed", 9, process)
    process.kill()
    process.communicate()
    for path in (tmp_path / "killed" / "tracker").rglob("events.out.tfevents.*"):
        # TensorBoard orders its files by the second they were opened in: this one a minute ago.
        kind, _, rest = path.name.partition("tfevents.")
        second, _, where = rest.partition(".")
        path.rename(path.with_name(f"{kind}tfevents.{int(second) - 60}.{where}"))
    train(load_recipe(recipe, options))
    events = EventAccumulator(str(tmp_path / "killed" / "tracker"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 41))
