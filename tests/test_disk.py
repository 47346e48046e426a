"""Whole files, locks and comparisons, with processes that are killed half-way."""

import hashlib
import json
import multiprocessing
import os
import signal

import pytest

from transformers_radio import disk


def _write_and_die(path):
    with disk.replace_whole(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def _hold(folder, ready, release):
    with disk.lock_folder(folder, "taken"):
        ready.set()
        release.wait()


def test_a_killed_writer_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "below" / "result.json"
    disk.write_json(path, {"whole": 1})
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"whole": 1}
    disk.write_json(path, {"whole": 2})
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]  # the leftover is gone as well


def test_a_failed_write_leaves_no_temporary(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    for unique in (False, True):
        with pytest.raises(RuntimeError), disk.replace_whole(path, unique) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_folders_are_replaced_whole(tmp_path):
    for content in ("one", "two"):
        with disk.replace_whole(tmp_path / "student") as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "two"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_a_killed_attempt_left_has_no_part_in_the_next(tmp_path, kind):
    leftover, victim = tmp_path / "out.tmp", tmp_path / "victim"
    victim.write_text("mine")
    if kind == "file":
        leftover.write_text("half of something longer")
    elif kind == "folder":
        (leftover / "stale").mkdir(parents=True)
    else:
        leftover.symlink_to(victim)
    disk.write_text(tmp_path / "out", "whole")
    assert (tmp_path / "out").read_text() == "whole" and victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    ready.wait()
    with pytest.raises(FileExistsError, match="^taken$"):
        disk.lock_folder(tmp_path, "taken")
    process.kill()
    process.join()
    disk.lock_folder(tmp_path, "taken").close()


def test_what_a_full_disk_raises_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"file could not be written \(RuntimeError: enforce fail; .* free\): make room"):
        with disk.writing(tmp_path / "missing" / "file"):
            raise RuntimeError("enforce\nfail")
    with pytest.raises(KeyError), disk.writing(tmp_path / "file"):
        raise KeyError("not the disk's")
    with pytest.raises(OSError, match="KeyError"), disk.writing(tmp_path / "file", also=(KeyError,)):
        raise KeyError("the library's")


def test_a_digest_is_that_of_the_joined_parts():
    assert disk.digest(["one", b"two"]) == hashlib.blake2b(b"onetwo", digest_size=16).hexdigest()


def test_a_fingerprint_knows_names_sizes_and_dates_and_not_the_place(tmp_path):
    prints = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "file"
        disk.write_text(path, "text")
        os.utime(path, ns=(5, 5))
        prints.append(disk.fingerprint_files([str(path)], path.parent))
    os.utime(path, ns=(5, 6))
    assert prints[0] == prints[1] != disk.fingerprint_files([str(path)], path.parent)


def test_differences_are_named_with_both_values():
    there = {"k": 20, "bank": {"files": "x", "rows": 1}, "sizes": [1, 2]}
    here = {"k": 10, "bank": {"files": "y", "rows": 1}, "sizes": (1, 2), "new": {}}
    assert disk.differences(there, here, ["k", "bank.rows", "sizes"]) == ["k (20 there, 10 here)"]
    assert disk.differences(there, here) == [
        *("bank.files ('x' there, 'y' here)", "k (20 there, 10 here)", "new (None there, {} here)")
    ]
    assert disk.differences(there, here, is_free=lambda name: name != "k") == ["k (20 there, 10 here)"]


def _write_alone(path, ready, release):
    with disk.only_writer(path):
        ready.set()
        release.wait()


def test_one_process_at_a_time_writes_a_path(tmp_path):
    path = tmp_path / "below" / "out"
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_write_alone, args=(path, ready, release))
    process.start()
    ready.wait()
    with pytest.raises(FileExistsError, match="another process is writing .*out now"), disk.only_writer(path):
        pass
    process.kill()
    process.join()
    with disk.only_writer(path):  # a lock ends with its process, and its file with the block
        path.touch()
    assert [file.name for file in path.parent.iterdir()] == ["out"]
