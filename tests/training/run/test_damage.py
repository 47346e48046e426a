"""What a dying or full disk leaves in a run's folder: the same bits, an older checkpoint, or one line with the fix."""

import importlib
import json
import random
import re
import resource
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from transformers_radio.disk import temporary_path
from transformers_radio.training import cache, load_recipe, train
from transformers_radio.training.phi_s import statistics
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.run import checkpoint, export
from transformers_radio.training.run import folder as run_folder
from transformers_radio.training.run import log as progress
from transformers_radio.training.run.signals import StopSignal

LAST = "checkpoints/step-00000004"
OPTIONS = ["stages.main.steps=6", "checkpoints.every_steps=2", "log_every_steps=1"]
OPTIONS += ["loss.standardization=phi_s", "loss.statistics_images=24"]


def weights(run):
    return (run / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder, recipe_text):
    """A run stopped in its fourth step of six, and the same run finished, both at the path that `start` trains in."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("damage")
        (folder / "recipe.yaml").write_text(recipe_text.format(output=folder / "run", images=image_folder))
        patch.setattr(StopSignal, "agreed", lambda self, _: setattr(self, "number", 15) or self.steps.pop())
        patch.setattr(StopSignal, "steps", [True, False, False, False], raising=False)
        train(load_recipe(folder / "recipe.yaml", OPTIONS))
        shutil.copytree(folder / "run", folder / "unfinished")
    train(load_recipe(folder / "recipe.yaml", OPTIONS))
    shutil.copytree(folder / "run", folder / "finished")
    return folder


@pytest.fixture
def start(runs):
    """Puts one of the runs into its place, lets something be damaged, and trains."""

    def start(which, change, *overrides):
        shutil.rmtree(runs / "run", ignore_errors=True)
        shutil.copytree(runs / which, runs / "run")
        change(runs / "run")
        return train(load_recipe(runs / "recipe.yaml", [*OPTIONS, *overrides]))

    return start


def damaged(name, how, seed=0):
    """Changes the bytes of a file: somewhere, from somewhere on, or all."""

    def change(run):
        data = bytearray((run / name).read_bytes())
        place = random.Random(f"{name} {how} {seed}").randrange(len(data))
        if how == "flip":
            data[place] ^= 1 << seed % 8
        elif how == "zeros":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        elif isinstance(how, bytes):
            data = how
        else:
            data = data[: {"cut": place, "empty": 0}[how]]
        (run / name).write_bytes(data)

    return change


def swapped(name, other):
    def change(run):
        (run / name).rename(run / "aside")
        (run / other).rename(run / name)
        (run / "aside").rename(run / other)

    return change


OF_A_CHECKPOINT = ["config.json", "model.safetensors", "modeling_radio.py", "manifest.json"]
OF_A_CHECKPOINT += [
    f"training_state/{name}" for name in ("model.safetensors", "optimizer.pt", "random_0.pt", "state.json")
]
STATISTICS = ["statistics/clip.safetensors", "statistics/sam.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[
            (damaged(f"{LAST}/{name}", how), r"step-00000004 is damaged \(.*; falling back to the one before")
            for name, how in zip(OF_A_CHECKPOINT, 2 * ["flip", "cut", "empty", "zeros"], strict=True)
        ],
        *[(damaged(f"{LAST}/manifest.json", text), "is damaged") for text in (b"[]", b"null", b"{}", b'{"a": 1}')],
        (lambda run: (run / LAST).rename(run / "checkpoints/step-00000005"), "it holds step 4, not that of its name"),
        (lambda run: (run / "checkpoints/step-00000006").write_text("no folder"), "step-00000006 is damaged"),
        (lambda run: temporary_path(run / LAST).write_text("no folder"), None),
        *[
            (damaged(STATISTICS[0], how), "clip.safetensors is damaged or missing")
            for how in ("cut", "empty", "zeros")
        ],
        *[(damaged(STATISTICS[1], "flip", seed), "sam.safetensors is damaged or missing") for seed in range(3)],
        (swapped(*STATISTICS), "sam.safetensors is damaged or missing"),
        (lambda run: shutil.rmtree(run / "statistics"), "clip.safetensors is damaged or missing"),
        (damaged("metrics.jsonl", b'{"step": 1}\nno json\n[2]\n{"step": 2}\n\xff\n{"st'), "the damaged lines 2, 3, 5"),
    ],
)
def test_a_damaged_run_says_so_and_ends_with_the_same_bits(start, runs, change, said, caplog):
    assert start("unfinished", change).step == 6
    assert weights(runs / "run") == weights(runs / "finished")
    assert said is None or re.search(said, caplog.text), caplog.text
    steps = [json.loads(line)["step"] for line in (runs / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_statistics_that_cannot_be_had_again_are_refused(start, monkeypatch):
    measure = statistics._measure

    def measure_others(run, *arguments):
        recipe = replace(run.recipe, loss=replace(run.recipe.loss, statistics_images=20))
        return measure(replace(run, recipe=recipe), *arguments)

    monkeypatch.setattr(statistics, "_measure", measure_others)
    with pytest.raises(ValueError, match=r"clip.safetensors was damaged .* restore the file, or set overwrite=true"):
        start("unfinished", damaged(STATISTICS[0], "flip"))


def without_checksums(run):
    """As older versions left it: the checkpoint does not name the statistics."""
    for name in sorted(path.name for path in (run / "checkpoints").iterdir()):
        state = run / "checkpoints" / name / "training_state/state.json"
        content = json.loads(state.read_text())
        del content["statistics"]
        state.write_text(json.dumps(content))
        manifest = run / "checkpoints" / name / "manifest.json"
        entries = json.loads(manifest.read_text())
        entries["training_state/state.json"] = run_folder.size_and_checksum(state)
        manifest.write_text(json.dumps(entries))


def test_runs_of_older_versions_resume(start, runs, caplog):
    assert start("unfinished", without_checksums).step == 6 and weights(runs / "run") == weights(runs / "finished")
    assert "damaged" not in caplog.text

    def cut(run):
        without_checksums(run)
        damaged(STATISTICS[1], "cut")(run)

    def narrower(run):
        without_checksums(run)
        tensors = load_file(run / STATISTICS[1])
        save_file({**tensors, "mean": tensors["mean"][:3].clone()}, run / STATISTICS[1])

    for change, message in (
        (cut, "sam.safetensors is damaged"),
        (narrower, r"a mean of shape \(3,\), expected \(20,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            start("unfinished", change)


def both(*changes):
    return lambda run: [change(run) for change in changes]


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        *[
            ("finished", damaged(f"student/{name}", how), rf"student is damaged \({name} has .*delete this folder")
            for name, how in (("model.safetensors", "flip"), ("model.safetensors", "cut"), ("config.json", "empty"))
        ],
        ("finished", lambda run: (run / "student/config.json").unlink(), "config.json is missing"),
        (
            "finished",
            both(lambda run: shutil.rmtree(run / "checkpoints"), damaged("student/model.safetensors", "cut")),
            "student is damaged .*restore it, or set overwrite=true",
        ),
        ("unfinished", lambda run: (run / "student").mkdir(), "delete this folder, and the same command resumes from"),
        ("unfinished", lambda run: (run / "student").write_text("no folder"), "delete this folder"),
        *[
            (which, damaged("run.yaml", how), "run.yaml cannot be read .*it is unknown which run this is")
            for which, how in (("finished", b"data: ["), ("unfinished", "empty"), ("unfinished", b"[]"))
        ],
        (
            "unfinished",
            swapped("checkpoints/step-00000002", LAST),
            r"all checkpoints .* \(step-00000004: it holds step 2, .*; step-00000002: it holds step 4, .*restore one",
        ),
        (
            "unfinished",
            both(
                damaged(f"{LAST}/config.json", "cut"),
                damaged("checkpoints/step-00000002/training_state/optimizer.pt", "flip"),
            ),
            r"step-00000004: config.json has .*step-00000002: training_state/optimizer.pt has another checksum",
        ),
    ],
)
def test_what_cannot_go_on_is_refused_and_overwrite_begins_anew(start, runs, which, change, message):
    with pytest.raises(ValueError, match=message) as error:
        start(which, change)
    assert len(str(error.value).splitlines()) == 1 and str(runs / "run") in str(error.value)
    if "delete this folder" in message:
        shutil.rmtree(runs / "run/student") if (runs / "run/student").is_dir() else (runs / "run/student").unlink()
        assert train(load_recipe(runs / "recipe.yaml", OPTIONS)).step == 6
    else:
        assert start(which, change, "overwrite=true").step == 6
    assert weights(runs / "run") == weights(runs / "finished")


def test_a_finished_student_without_its_checkpoints_is_finished(start, runs):
    assert start("finished", lambda run: shutil.rmtree(run / "checkpoints")).student_dir == runs / "run/student"


class Full:
    """A disk on which no file can grow, while a function runs."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **named):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            return self.function(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


CACHED = ["data.frozen_crops=true", "teacher_cache={run}/cache"]


@pytest.mark.parametrize(
    ("owner", "name", "file", "options"),
    [
        (run_folder, "save_recipe", "run/run.yaml", []),
        (statistics, "save_file", "run/statistics/clip.safetensors", []),
        (progress.Log, "write", "run/metrics.jsonl", []),
        (checkpoint, "_write_manifest", "run/checkpoints/step-00000002", []),
        (export.shutil, "copytree", "run/student", []),
        (cache.TeacherCaches, "_open", "run/cache/clip-48/fingerprint.json", CACHED),
        (cache, "save_file", r"run/cache/\w+-48/pending.tmp/\S+", CACHED),
    ],
)
def test_a_full_disk_names_the_file_and_the_same_command_resumes(owner, name, file, options, runs, start, monkeypatch):
    options = [option.format(run=runs / "run") for option in options]
    full = Full(getattr(owner, name))
    shutil.rmtree(runs / "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments, **named: full(*arguments, **named))
        with pytest.raises(OSError, match=rf"{file} could not be written \(.*bytes free.*make room") as error:
            train(load_recipe(runs / "recipe.yaml", [*OPTIONS, *options]))
    assert len(str(error.value).splitlines()) == 1
    assert train(load_recipe(runs / "recipe.yaml", [*OPTIONS, *options])).step == 6
    if not options:
        assert weights(runs / "run") == weights(runs / "finished")


def test_a_second_start_is_refused_before_it_loads_anything(runs, start, monkeypatch):
    monkeypatch.setattr(importlib.import_module("transformers_radio.training.train"), "build_teachers", None)
    recipe = load_recipe(runs / "recipe.yaml", OPTIONS)

    def occupy(run):
        locks.append(run_folder.open_run(recipe, run / LAST))

    locks = []
    with pytest.raises(FileExistsError, match="another process is training in output_dir"):
        start("unfinished", occupy)
    locks[0].close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "output_dir=/dev/null/run",
            "output_dir /dev/null/run cannot be written: /dev/null is not a folder",
        ),
        (
            "teacher_cache=/dev/null",
            "teacher_cache /dev/null cannot be written: /dev/null is not a folder",
        ),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_before_anything_is_loaded(make_recipe, override, message, monkeypatch):
    monkeypatch.setattr(importlib.import_module("transformers_radio.training.train"), "build_teachers", None)
    with pytest.raises(OSError, match=message):
        train(load_recipe(make_recipe(), [override, "data.frozen_crops=true"]))


def test_a_plan_notes_that_this_machine_has_no_such_folder(make_recipe, capsys):
    print_plan(load_recipe(make_recipe(), ["output_dir=/dev/null/run"]))
    assert "note: output_dir /dev/null/run cannot be written: /dev/null is not a folder" in capsys.readouterr().out
