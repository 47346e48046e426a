"""Whole files, locks and comparisons, with processes that are killed half-way."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
from unittest import mock

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
    leftover, victim = disk.temporary_path(tmp_path / "out"), tmp_path / "victim"
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


@pytest.mark.parametrize("unique", [False, True])
def test_files_of_a_user_are_no_leftovers(tmp_path, unique):
    mine = [f"out{end}" for end in (".tmp", ".lock")] + [f".out{end}" for end in (".tmp", ".lock")]
    mine.append(f".out.{os.getpid()}.tmp")
    for name in mine:
        (tmp_path / name).write_text("mine")
    path = tmp_path / "out"
    with disk.only_writer(path), disk.replace_whole(path, unique) as temporary:
        temporary.write_text("whole")
    with disk.new_folder(tmp_path / "folder", "DST", "source") as temporary:
        temporary.mkdir()
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "out", "folder"])


def _fill(folder):
    with disk.new_folder(folder, "DST", "source") as temporary:
        temporary.mkdir()
        for name in ("a", "config.json", "z"):
            (temporary / name).write_text("whole")


@pytest.mark.parametrize("place", ["new", "below/new", "empty", "link", "."])
def test_a_new_folder_is_where_it_was_asked_for(tmp_path, monkeypatch, place):
    """Not beside a link or another disk, and a shell that stands in the folder keeps it."""
    for name in ("empty", "target", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "here" if place == "." else tmp_path)
    before = os.stat(place).st_ino if os.path.exists(place) else None
    with pytest.raises(RuntimeError), disk.new_folder(type(tmp_path)(place), "DST", "source") as temporary:
        temporary.mkdir()
        raise RuntimeError
    _fill(type(tmp_path)(place))
    assert sorted(os.listdir(place)) == ["a", "config.json", "z"] and os.stat(place).st_ino == (before or mock.ANY)
    assert (tmp_path / "link").is_symlink() and len(os.listdir(tmp_path / "target")) == 3 * (place == "link")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    with pytest.raises(FileExistsError, match="exists already; give a new folder"):
        _fill(type(tmp_path)(place))


def _fill_and_die(folder):
    with disk.new_folder(folder, "DST", "source") as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("is_there", [False, True])
def test_what_a_kill_left_of_a_new_folder_is_not_in_the_way(tmp_path, is_there):
    folder = tmp_path / "out"
    if is_there:
        folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_fill_and_die, args=(folder,))
    process.start()
    process.join()
    assert list(tmp_path.rglob("half"))
    _fill(folder)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["out", "out/a", "out/config.json", "out/z"]


def test_what_comes_into_a_new_folder_meanwhile_is_kept(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(FileExistsError, match="exists already"):
            with disk.new_folder(folder, "DST", "source") as temporary:
                temporary.mkdir()
                (temporary / "file").write_text("ours")
                folder.mkdir(exist_ok=True)
                (folder / "file").write_text("mine")
        assert [path.name for path in folder.iterdir()] == ["file"] and (folder / "file").read_text() == "mine"


def test_a_place_for_nothing_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "source").mkdir()
    (tmp_path / "same").symlink_to(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    for place, error, message in (
        ("file/sub", OSError, r"^DST \S+/file/sub cannot be written: \S+/file is not a folder; choose another DST$"),
        ("link", OSError, r"link cannot be written: \S+/link is a link to \S+/gone, which is not there; choose"),
        ("link/sub", OSError, r"link/sub cannot be written: \S+/link is a link to \S+/gone"),
        ("source/inner", ValueError, r"^DST \S+/source/inner lies in \S+/source, which is read; choose a folder out"),
        ("same/deep/inner", ValueError, "inner lies in"),
    ):
        with pytest.raises(error, match=message):
            disk.check_new(tmp_path / place, "DST", tmp_path / "source")
    disk.check_new(tmp_path / "source-2", "DST", tmp_path / "source")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # everything may be written by root, who may run this
    with pytest.raises(OSError, match=r"new cannot be written: \S+ may not be written into; choose another DST"):
        disk.check_new(tmp_path / "new", "DST", tmp_path / "source")
    assert sorted(tmp_path.rglob("*")) == before


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
    with pytest.raises(OSError, match="No space left .* free.: kept; make room"), disk.writing(tmp_path, "kept; "):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for cause in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        with pytest.raises(OSError, match="free.: kept; choose a place") as raised, disk.writing(tmp_path, "kept; "):
            raise OSError(cause, os.strerror(cause))
        assert "make room" not in str(raised.value)
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
