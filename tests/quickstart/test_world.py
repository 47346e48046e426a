"""The world on disk: the same bytes from any number of workers, whole or made again, readable by other readers."""

import collections
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from transformers_radio.disk import lock_folder
from transformers_radio.quickstart.scenes import PHOTOGRAPHS, draw_scene
from transformers_radio.quickstart.world import CLASS_NAMES, make_world, read_split

COUNTS = {"train": 24, "validation": 6, "seed": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), **COUNTS, workers=1)


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_number_of_workers_changes_no_byte(world, tmp_path):
    make_world(tmp_path, **COUNTS, workers=3)
    assert _files(tmp_path) == _files(world.directory)
    assert len([name for name in _files(tmp_path) if name.endswith(".tar")]) == 8 + 2


def test_the_shards_hold_the_scenes(world):
    """Read with tarfile and PIL alone."""
    with tarfile.open(world.directory / "validation-000001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    keys = {name.partition(".")[0] for name in files}
    assert keys == {f"validation-{index:06d}" for index in (3, 4, 5)}
    extensions = {"jpg", "txt", "cls", "semantic.png", "instances.png", "json"}
    assert set(files) == {f"{key}.{extension}" for key in keys for extension in extensions}
    scene = draw_scene("validation", 3, 4)
    image = np.asarray(Image.open(io.BytesIO(files["validation-000004.jpg"])))
    assert image.shape == (128, 128, 3)
    assert np.abs(image.astype(int) - scene.image).mean() < 6  # JPEG
    for name in ("semantic", "instances"):
        stored = Image.open(io.BytesIO(files[f"validation-000004.{name}.png"]))
        assert stored.mode == "L" and (np.asarray(stored) == getattr(scene, name)).all()
    assert files["validation-000004.txt"].decode() == scene.caption
    assert int(files["validation-000004.cls"]) == scene.main_class
    objects = json.loads(files["validation-000004.json"])["objects"]
    assert [(o["shape"], o["material"], tuple(o["box"]), o["area"]) for o in objects] == [
        (o.shape, o.material, o.box, o.area) for o in scene.objects
    ]


def test_read_split_streams_all_samples_in_order(world):
    samples = list(read_split(world.directory, "train"))
    assert [s["__key__"] for s in samples] == [f"train-{i:06d}" for i in range(24)]
    assert samples[0]["jpg"].size == (128, 128) and np.asarray(samples[0]["instances.png"]).max() >= 1
    assert {len(s["json"]["objects"]) for s in samples} > {1, 2}
    assert list(next(iter(read_split(world.directory, "validation", ["cls"])))) == ["cls"]


def test_classes_are_balanced(world):
    seen = collections.Counter(s["cls"] for s in read_split(world.directory, "train", ["cls"]))
    assert max(seen.values()) == 1  # 24 scenes of 96 classes: none twice
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 96 and world.classes == CLASS_NAMES


def test_the_index_lists_disjoint_photographs(world):
    index = json.loads((world.directory / "world.json").read_text())
    assert index["photographs"] == {split: list(names) for split, names in PHOTOGRAPHS.items()}
    assert not set(index["photographs"]["train"]) & set(index["photographs"]["validation"])
    assert index["counts"] == {"train": 24, "validation": 6} and index["seed"] == 3


def test_a_whole_world_is_reused_and_a_damaged_or_different_one_is_replaced(world, tmp_path):
    make_world(tmp_path, **COUNTS, workers=2)
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "train-mine.tar").write_text("keep me too")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_world(tmp_path, **COUNTS, workers=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times

    shard = tmp_path / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    make_world(tmp_path, **COUNTS, workers=2)
    files = _files(tmp_path)
    assert (files.pop("mine.txt"), files.pop("train-mine.tar")) == (b"keep me", b"keep me too")
    assert files == _files(world.directory)

    make_world(tmp_path, train=16, validation=4, seed=3, workers=2)
    assert len(list(read_split(tmp_path, "train", ["cls"]))) == 16


def test_a_killed_run_is_made_again(world, tmp_path):
    code = (
        "from pathlib import Path; from transformers_radio.quickstart.world import make_world\n"
        f"if __name__ == '__main__': make_world(Path({str(tmp_path)!r}), train=3000, validation=100, workers=2)"
    )
    script = tmp_path / "make.py"
    script.write_text(code)
    run = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 100_000 for p in tmp_path.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert any(tmp_path.glob(".*.tmp")) and not (tmp_path / "world.json").exists()
    with pytest.raises(FileNotFoundError, match="make_world"):
        read_split(tmp_path / "elsewhere", "train")

    make_world(tmp_path, **COUNTS, workers=2)
    script.unlink()
    assert _files(tmp_path) == _files(world.directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 7}, "train is 7 scenes; expected at least 8"),
        ({"validation": 1}, "validation is 1 scenes; expected at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_arguments_are_named_before_any_file_is_touched(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_world(tmp_path / "world", **arguments)
    assert not (tmp_path / "world").exists()


def test_a_second_process_leaves_the_first_alone(world, tmp_path):
    shutil.copytree(world.directory, tmp_path / "world")
    (tmp_path / "world" / "world.json").unlink()  # as while they are drawn
    before = _files(tmp_path / "world")
    with (
        lock_folder(tmp_path / "world", "taken"),
        pytest.raises(FileExistsError, match="another process draws scenes"),
    ):
        make_world(tmp_path / "world", **COUNTS)
    assert _files(tmp_path / "world") == before


def test_an_unknown_split_is_named(world):
    with pytest.raises(ValueError, match="split is 'test'"):
        read_split(world.directory, "test")
