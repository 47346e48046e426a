"""What is read of a run while it trains, against counts by hand; and that the run does not notice."""

import json
import os
import shutil
import time

import pytest

from helpers.watched_run import line, save_checkpoint, write
from transformers_radio.demo import run_view
from transformers_radio.demo.run_view import Watcher, curve, loss_terms, open_recipe, progress, read_log
from transformers_radio.disk import lock_folder, temporary_path


def test_half_written_and_damaged_lines_are_left_out(run):
    assert read_log(run) == []
    write(run, line(10), line(20), tail='{"step": 30, "st')
    assert read_log(run) == [line(10), line(20)]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'age": "low"}\nnot json\n[1]\n{"step": "x"}\n\xff\xfe\n' + json.dumps(line(40)).encode() + b"\n")
    assert [one["step"] for one in read_log(run)] == [10, 20, 30, 40]


def test_curves_keep_their_ends_and_are_thinned(run):
    lines = [line(step) for step in range(1, 1201)]
    assert loss_terms([{"step": 1, "loss": 1.0}, *lines]) == ["clip/summary", "dinov2/features"]
    points = curve(lines, "clip/summary")
    assert len(points) == 400 and points[-1] == (1200, 1 / 1200)
    assert {later[0] - earlier[0] for earlier, later in zip(points, points[1:], strict=False)} == {3}
    assert curve(lines[:3], "lr") == [(1, 1e-3), (2, 1e-3), (3, 1e-3)]
    assert curve([{"step": 1}, {"step": 2, "lr": None}], "lr") == []


def test_the_time_left_counts_the_images_to_come(run):
    recipe = open_recipe(run)
    assert progress(run, recipe, []) == run_view.Progress(step=0, total_steps=120)
    write(run, line(90))
    now = progress(run, recipe, read_log(run))
    # 10 steps of 8 images; 20 steps of 6; every second of 20 steps with 4
    assert now.seconds_left == pytest.approx((10 * 8 + 20 * 6 + 10 * 4) / 40)
    assert (now.step, now.total_steps, now.stage, now.skipped, now.finished) == (90, 120, "low", 3, False)
    assert (now.learning_rate, now.images_per_second, now.data_wait) == (1e-3, 40.0, 0.1)
    assert 0 <= now.seconds_ago < 5
    # a slow line, such as one with a checkpoint in it, does not count
    write(run, line(95), line(99), line(100, images_per_second=1.0), line(110, "high"))
    assert progress(run, recipe, read_log(run)).seconds_left == pytest.approx((10 * 6 + 5 * 4) / 40)
    write(run, line(120, "high"))
    (run / "student").mkdir()
    assert progress(run, recipe, read_log(run)).seconds_left == 0 and progress(run, recipe, []).finished


def test_skipped_images_have_their_reasons_from_the_newest_checkpoint(run):
    save_checkpoint(run, 10, {"truncated": 7})
    save_checkpoint(run, 20, {"truncated": 1, "too small": 5})
    temporary_path(run / "checkpoints" / "step-00000030").mkdir()
    assert progress(run, open_recipe(run), []).reasons == {"truncated": 2, "too small": 5}
    (run / "checkpoints" / "step-00000020" / "training_state" / "state.json").write_text("{")
    assert progress(run, open_recipe(run), []).reasons == {}


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run, as it has no run\.yaml"):
        Watcher(tmp_path)


def test_pictures_outlive_their_checkpoints(run):
    first = save_checkpoint(run, 10)
    watcher = Watcher(run, count=2)
    assert len(watcher.images) == 2 and watcher.note == ""
    watcher.look()
    assert [one.shape for one in watcher.pictures[10]] == 2 * [watcher.pictures[10][0].shape]
    shutil.rmtree(first)
    save_checkpoint(run, 20)
    watcher.look()
    assert sorted(watcher.pictures) == [10, 20]


def test_a_checkpoint_that_vanishes_or_is_damaged_is_passed_over(run, caplog, monkeypatch):
    folder = save_checkpoint(run, 10)
    (folder / "model.safetensors").write_bytes(b"damaged")
    gone = save_checkpoint(run, 20)
    watcher = Watcher(run, count=1)
    encode = run_view.checkpoint_colors

    def vanishing(checkpoint, images):
        if checkpoint == gone:
            shutil.rmtree(gone)
        return encode(checkpoint, images)

    monkeypatch.setattr(run_view, "checkpoint_colors", vanishing)
    watcher.look()
    watcher.look()
    assert watcher.pictures == {}
    assert [record.getMessage().partition(" is not shown")[0] for record in caplog.records] == [str(folder)]


def test_without_images_the_losses_are_still_shown(run, tmp_path):
    shutil.rmtree(tmp_path / "images")
    watcher = Watcher(run)
    assert watcher.images == [] and watcher.note.startswith("No pictures: ")
    with pytest.raises((OSError, ValueError)):  # the user's own
        Watcher(run, data=str(tmp_path / "nothing"))
    assert Watcher(run, count=0).note == "Pictures were left out with --images 0."


def test_the_run_is_only_read_and_may_be_locked(run):
    save_checkpoint(run, 10)
    write(run, line(10))
    lock = lock_folder(run, "locked")  # as training holds it
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    watcher = Watcher(run, count=1)
    watcher.look()
    watcher.progress()
    assert watcher.pictures and watcher.lines
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before
    lock.close()
    watcher.look()
    lock_folder(run, "the watcher took the lock").close()


def test_a_thread_sees_what_training_writes(run):
    write(run, line(10))
    watcher = Watcher(run, count=0)
    watcher.start(0.02)
    assert len(watcher.lines) == 1
    write(run, line(10), line(20))
    until = time.monotonic() + 10
    while len(watcher.lines) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    watcher.stop()
    assert len(watcher.lines) == 2
