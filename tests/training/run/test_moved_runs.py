"""Runs that resume elsewhere: with other passes, less memory, several data sets, or a server that was down."""

import functools
import itertools
import json
import shutil

import datasets
import fsspec
import pytest
import torch
from safetensors.torch import load_file

from transformers_radio.data import SourceError, listing
from transformers_radio.data.files import find_files
from transformers_radio.teachers import digest_weights
from transformers_radio.training import load_recipe, stage, train
from transformers_radio.training.run.signals import StopSignal

# Nothing is drawn at random by each pass, so that runs with other passes can be compared.
PLAIN = ["student.config.cpe_sampling=false", "student.config.pos_dropout=0", "optimizer.eps=1e-3"]


def weights(run):
    return load_file(run / "student" / "model.safetensors")


def assert_close(run, other, atol):
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def cut_back(run, step):
    """As a run that was killed after this step's checkpoint."""
    shutil.rmtree(run / "student")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name[5:13]) > step:
            shutil.rmtree(checkpoint)


def test_other_passes_are_refused_within_a_stage_unless_the_data_restarts(make_recipe, tmp_path, caplog):
    train(load_recipe(make_recipe("whole"), PLAIN))
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    recipe = make_recipe("moved")
    cut_back(tmp_path / "moved", 9)
    halves = [*PLAIN, "stages.main.micro_batch_size=2"]
    message = (
        "stages.main had 4 images in a pass .* and has 2 now.*set stages.main.micro_batch_size=4, on a number of "
        "processes that divides 1.*restart_data=true"
    )
    with pytest.raises(ValueError, match=message):
        train(load_recipe(recipe, halves))
    assert not (tmp_path / "moved" / "student").exists()
    train(load_recipe(recipe, [*PLAIN, "stages.main.micro_batch_size=4"]))  # what the message tells
    assert_close(tmp_path / "whole", tmp_path / "moved", atol=0)
    cut_back(tmp_path / "moved", 9)
    assert train(load_recipe(recipe, [*halves, "restart_data=true"])).step == 12
    assert "begins again" in caplog.text and "had 4 images in a pass" in caplog.text


def test_a_run_lists_its_images_once(make_recipe, image_folder, tmp_path, monkeypatch):
    """However many streams its stages open; what arrives meanwhile does not change the data of a later stage."""
    images, listed = tmp_path / "photos", []
    shutil.copytree(image_folder, images)

    def list_and_add_one(path, split, where):
        found = find_files(path, split, where)
        listed.append(path)
        shutil.copy(images / "part0" / "00.png", images / f"{len(listed)}.png")
        return found

    monkeypatch.setattr("transformers_radio.data.listing.find_files", list_and_add_one)
    stages = ["stages.main.steps=3", "stages.more={steps: 2, resolution: 32, batch_size: 4}"]
    assert train(load_recipe(make_recipe(images=images), stages)).step == 5
    assert listed == [str(images)]
    assert not listing._kept  # another run looks anew


def test_a_new_stage_has_passes_of_its_own(make_recipe, tmp_path):
    stages = ["stages.main.steps=3", "stages.high={steps: 3, resolution: 48, batch_size: 4, micro_batch_size: 2}"]
    train(load_recipe(make_recipe("whole"), stages))
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    cut_back(tmp_path / "moved", 3)
    train(load_recipe(make_recipe("moved"), stages))
    assert_close(tmp_path / "whole", tmp_path / "moved", atol=0)


def test_a_run_resumes_with_less_memory_and_learns_the_same(make_recipe, tmp_path):
    train(load_recipe(make_recipe("whole"), PLAIN))
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    cut_back(tmp_path / "moved", 9)
    less = ["student.gradient_checkpointing=true", "teachers.sam.placement=offloaded"]
    train(load_recipe(make_recipe("moved"), [*PLAIN, *less]))
    assert_close(tmp_path / "whole", tmp_path / "moved", atol=1e-6)
    cut_back(tmp_path / "moved", 9)
    with pytest.raises(FileExistsError, match="teachers.sam.options.width"):  # but an option of a teacher may not
        train(load_recipe(make_recipe("moved"), [*PLAIN, "teachers.sam.options.width=24"]))


def test_a_mixture_resumes_to_the_bit(make_recipe, image_folder, tmp_path):
    sources = [f"{part}: {{path: {image_folder / part}, weight: {n}}}" for n, part in enumerate(("part0", "part1"), 1)]
    mixture = ["data.path=null", f"data.sources={{{', '.join(sources)}}}"]
    train(load_recipe(make_recipe("whole"), mixture))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 9)
    train(load_recipe(make_recipe("cut"), mixture))
    assert_close(tmp_path / "whole", tmp_path / "cut", atol=0)
    cut_back(tmp_path / "cut", 9)
    with pytest.raises(FileExistsError, match="data.sources.part1.weight"):
        train(load_recipe(make_recipe("cut"), [*mixture, "data.sources.part1.weight=5"]))


def test_a_lost_server_stops_the_run_and_the_same_command_resumes(make_recipe, image_folder, tmp_path, monkeypatch):
    from helpers.flaky_server import FlakyServer, HttpFileSystem
    from helpers.sample_images import write_tar

    fsspec.register_implementation("http", HttpFileSystem, clobber=True)
    for name in [name for name in vars(datasets.config) if name.startswith("STREAMING_")]:  # the stream changes them
        monkeypatch.setattr(datasets.config, name, getattr(datasets.config, name))
    images = sorted(image_folder.rglob("*.png"))
    write_tar(tmp_path / "served" / "train.tar", {path.stem: {"png": path.read_bytes()} for path in images})
    server = FlakyServer(tmp_path / "served")
    url, options = f"{server.url}/train.tar", ["data.retry_seconds=0.5"]
    train(load_recipe(make_recipe("whole", images=url), options))

    batches, to_device = itertools.count(1), stage.to_device

    def stop_at_the_fifth(batch, device):
        if next(batches) == 5:  # of 6 in a pass over the data
            server.stop()
        return to_device(batch, device)

    recipe = load_recipe(make_recipe("stopped", images=url), options)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "to_device", stop_at_the_fifth)
        with pytest.raises(SourceError, match="train.tar"):
            train(recipe)
    assert {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()} == {
        "step-00000003",
        "step-00000006",
    }
    server.start()
    train(recipe)
    server.stop()
    assert_close(tmp_path / "whole", tmp_path / "stopped", atol=0)


def test_a_run_does_not_go_on_with_other_weights_under_the_same_name(make_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(make_recipe(), ["stages.main.steps=4"])
    with monkeypatch.context() as stopping:
        stopping.setattr(StopSignal, "agreed", lambda self, accelerator: True)
        assert train(recipe).student_dir is None
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "training_state" / "teacher_manifest.json").read_text())
    from helpers.tiny_teachers import PatchTeacher

    clip = PatchTeacher("", 24, width=16)
    assert manifest["clip"] == {
        "type": "python",
        "checkpoint": "helpers.tiny_teachers:PatchTeacher",
        "weights": digest_weights(clip),
        "dtype": "float32",
        "image_size": 24,
    }
    build = PatchTeacher.__init__

    @functools.wraps(build)
    def other(self, *arguments, **options):
        build(self, *arguments, **options)
        self.model.bias.data += 1e-3 * (options["width"] == 20)

    with monkeypatch.context() as changed:
        changed.setattr(PatchTeacher, "__init__", other)
        message = r"teachers\.sam is not the one that taught until .* differs in weights \('\w+' there"
        with pytest.raises(ValueError, match=message):
            train(recipe)
    assert train(recipe).step == 4
