"""Which files of a folder are read, and that those left out are named."""

import glob
import logging
import os

import pytest

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import DataConfig, ImageStream

BLOB = encode(picture(0, 20, 20))


def fill(root, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BLOB)


def keys_and_notes(caplog, path, rank: int = 0, **fields) -> tuple[list[str], str]:
    """The keys of one epoch, and what was logged on the way."""
    caplog.clear()
    config = DataConfig(str(path), num_workers=0, shuffle_window=1, **fields)
    with caplog.at_level(logging.WARNING):
        stream = ImageStream(config, [8], batch_size=1, seed=0, rank=rank, world_size=rank + 1)
        records = [
            key for shard in range(len(stream.sources[""].shards)) for key, _ in stream.sources[""].records(shard)
        ]
    return records, caplog.text


def test_folders_beside_the_split_are_named_with_the_way_to_read_them(tmp_path, caplog):
    fill(tmp_path, "train/a.jpg", *(f"more{i}/deep/b{i}.jpg" for i in range(7)), "loose.png")
    fill(tmp_path, "val/c.jpg", "validation/c.jpg", "Test/c.jpg", "dev/c.jpg", "eval_2/c.jpg", ".git/c.jpg")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("no image")
    keys, text = keys_and_notes(caplog, tmp_path)
    assert keys == ["train/a.jpg"]
    assert f"data.path='{tmp_path}'" in text and "only its sub-folder 'train'" in text
    assert (
        "7 folders with data (more0, more1, more2, more3, more4 and 2 more) and 1 file (loose.png) beside it" in text
    )
    assert "data.split" in text and os.path.join(tmp_path, "**", "*.jpg") in text
    for name in ("val", "Test", "dev", "eval_2", ".git", "notes"):
        assert f" {name}" not in text.replace("sub-folder", "")
    keys, text = keys_and_notes(caplog, tmp_path)
    assert keys and text == ""  # once in a process
    keys, text = keys_and_notes(caplog, tmp_path, split="more3")
    assert keys == ["more3/deep/b3.jpg"] and "7 folders" not in text and "6 folders with data (more0, " in text


def test_a_folder_with_splits_alone_and_other_ranks_say_nothing(tmp_path, caplog):
    fill(tmp_path / "a", "train/a.jpg", "val/b.jpg", "test/c.jpg")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "train")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert keys_and_notes(caplog, tmp_path / "a") == (["train/a.jpg"], "")
    fill(tmp_path / "b", "train/a.jpg", "train/b.jpg", "other/b.jpg", "train/c.txt")
    assert keys_and_notes(caplog, tmp_path / "b", rank=1)[1] == ""
    assert "1 folder with data (other)" in keys_and_notes(caplog, tmp_path / "b")[1]


def test_tars_whose_names_are_of_no_split_are_named(tmp_path, caplog):
    for name in ("train-0", "val-0", "extra-0", "extra-1"):
        write_tar(tmp_path / f"{name}.tar", {"x": {"jpg": BLOB}})
    keys, text = keys_and_notes(caplog, tmp_path)
    assert keys == ["train-0.tar/x"]
    assert "left out 2 files whose names do not start with 'train': extra-0.tar, extra-1.tar" in text


def test_links_are_followed_once_and_never_in_circles(tmp_path, caplog):
    fill(tmp_path, "elsewhere/z.jpg", "photos/b/1.jpg", "photos/b/2.jpg", "photos/c/3.jpg", "outside.jpg")
    photos = tmp_path / "photos"
    (photos / "a").symlink_to(photos / "b")  # sorts before the folder itself
    (photos / "c" / "up").symlink_to(photos)
    (photos / "c" / "higher").symlink_to(tmp_path)
    (photos / "one").symlink_to(tmp_path / "elsewhere")
    (photos / "two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(photos)
    (photos / "b" / "4.jpg").symlink_to(photos / "b" / "1.jpg")  # a file under a second name is a second image
    expected = ["b/1.jpg", "b/2.jpg", "b/4.jpg", "c/3.jpg", "one/z.jpg"]
    keys, text = keys_and_notes(caplog, photos)
    assert keys == expected
    assert "left out 5 links to folders that are read anyway: a, c/higher, c/up, two, one/back" in text
    assert sorted(keys_and_notes(caplog, photos / "**" / "*.jpg")[0]) == expected
    assert sorted(keys_and_notes(caplog, photos / "**")[0]) == expected
    keys, _ = keys_and_notes(caplog, photos / "*" / "**" / "[1-3].jpg")  # one folder by two ways
    assert sorted(os.path.basename(key) for key in keys) == ["1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize(
    "pattern", ["**/*.jpg", "**", "a/**/*.jpg", "*/**/[12].jpg", "**/c/**/*", "*/*.jpg", "**/.h/*"]
)
def test_patterns_match_what_glob_matches(pattern, tmp_path, caplog):
    fill(
        tmp_path, "1.jpg", "a/2.jpg", "a/b/1.jpg", "a/b/c/3.jpg", "a/b/c/d/4.jpg", "[x]/5.jpg", ".h/6.jpg", "e/.7.jpg"
    )
    keys, _ = keys_and_notes(caplog, tmp_path / pattern)
    expected = {file for file in glob.glob(str(tmp_path / pattern), recursive=True) if os.path.isfile(file)}
    shared = os.path.commonpath([os.path.dirname(file) for file in expected])
    assert keys and {os.path.join(shared, key) for key in keys} == expected


def test_a_linked_data_folder_is_read(tmp_path, caplog):
    fill(tmp_path, "real/a/1.jpg", "real/2.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert keys_and_notes(caplog, tmp_path / "link") == (["2.jpg", "a/1.jpg"], "")


def test_files_of_other_kinds_are_counted_by_extension(tmp_path, caplog):
    fill(tmp_path, *(f"a/{i}.txt" for i in range(10)), "a/x.heic", "b/y.HEIC", "README", ".hidden.jpg", "a/1.jpg")
    keys, text = keys_and_notes(caplog, tmp_path)
    assert keys == ["a/1.jpg"]
    assert "left out 14 files of other kinds: 10 .txt, 2 .heic, 1 hidden, 1 without ending" in text
    assert text.count("left out") == 1
    fill(tmp_path / "clean", "1.jpg")
    assert keys_and_notes(caplog, tmp_path / "clean") == (["1.jpg"], "")


@pytest.mark.parametrize(
    "extension",
    ["JPG", "jpeg", "JPEG", "jpe", "jfif", "mpo", "png", "PNG", "webp", "gif", "bmp", "tif", "TIFF", "ppm", "jp2"],
)
def test_extensions(extension, tmp_path, caplog):
    fill(tmp_path, f"1.{extension}")
    assert keys_and_notes(caplog, tmp_path) == ([f"1.{extension}"], "")


def test_hidden_folders_are_left_out_and_named(tmp_path, caplog):
    fill(tmp_path, "a/1.jpg", "a/.ipynb_checkpoints/2.jpg", ".thumbnails/x/3.jpg")
    for path in (tmp_path, tmp_path / "**" / "*.jpg"):
        keys, text = keys_and_notes(caplog, path)
        assert [os.path.basename(key) for key in keys] == ["1.jpg"]
        assert "left out 2 hidden folders: .thumbnails, a/.ipynb_checkpoints" in text
    assert keys_and_notes(caplog, tmp_path / ".thumbnails") == (["x/3.jpg"], "")  # asked for
    fill(tmp_path / "b", "train/1.jpg", "other/.thumbnails/2.jpg")
    assert keys_and_notes(caplog, tmp_path / "b") == (["train/1.jpg"], "")  # nothing beside the split was meant


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, caplog, monkeypatch):
    fill(tmp_path, "a/1.jpg", "lost+found/2.jpg")
    scandir = os.scandir

    def refuse(path):  # root may open everything, so the refusal has to be made up
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    keys, text = keys_and_notes(caplog, tmp_path)
    assert keys == ["a/1.jpg"]
    assert f"left out 1 folder that cannot be opened: {tmp_path}/lost+found (Permission denied)" in text
