"""The store against a plain loop over the images; killed, continued, on two processes, refused and out of room."""

import random
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import PartialState
from PIL import Image, ImageOps
from safetensors.torch import load_file

from helpers.classification_world import (
    CLASSES,
    pictures,
    run_processes,
    start_process,
    write_folders,
    write_parquet,
    write_tar,
)
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.images.summaries import StoreConfig, SummaryStore, store_summaries
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor

torch.set_num_threads(1)  # as in the processes that the tests start: bits are equal only for the same number

MADE = pictures(45, seed=0)
SMALL = {"image_size": (24, 32), "batch_size": 4, "num_workers": 2, "block_images": 8}
SETTINGS = {"model": "colors", "weights": "0"}


def encode(images):
    """Means of a 2 x 2 grid and the size of the image, which the mean would forget: 14 numbers."""
    means = F.adaptive_avg_pool2d(images, 2).flatten(1)
    sides = torch.tensor(images.shape[2:]).float().expand(len(images), 2)
    return torch.cat([means, sides], dim=1)


def expected_rows(made, resize):
    """What a loop over single images gives."""
    rows = []
    for pixels, _ in made:
        image = resize(Image.fromarray(pixels))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        rows.append(encode(tensor)[0])
    return torch.stack(rows)


def by_class(made):
    """In the order of class folders."""
    order = sorted(range(len(made)), key=lambda number: (sorted(CLASSES).index(CLASSES[made[number][1]]), number))
    return [(made[number][0], sorted(CLASSES).index(CLASSES[made[number][1]])) for number in order]


def store(folder, data, split="train", settings=SETTINGS, encode=encode, **changes):
    return store_summaries(folder, encode, settings, LabeledSplit(data, split), StoreConfig(**{**SMALL, **changes}))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"), "train", MADE)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), "train", MADE, files=3)


@pytest.mark.parametrize("kind", ["folders", "parquet", "tar"])
def test_two_numbers_scale_to_cover_and_cut_the_center(kind, tmp_path, request):
    data = write_tar(tmp_path / "data", "train", MADE) if kind == "tar" else request.getfixturevalue(kind)
    made = by_class(MADE) if kind == "folders" else MADE
    expected = expected_rows(made, lambda image: ImageOps.fit(image, (32, 24), Image.Resampling.BICUBIC))
    assert LabeledSplit(data, "train").count() == 45
    done = store(tmp_path / "store", data)
    assert len(done) == 45 and done.dim == 14 and done.skipped == {}
    assert done.labels.tolist() == [label for _, label in made]
    for rows in (1, 7, 16, 1000):
        chunks = list(done.chunks(rows))
        assert max(len(labels) for _, labels in chunks) <= rows
        torch.testing.assert_close(torch.cat([summaries for summaries, _ in chunks]), expected)
        assert torch.equal(torch.cat([labels for _, labels in chunks]), done.labels)


def test_one_number_keeps_the_aspect_ratio_of_every_image(folders, tmp_path):
    processor = RadioImageProcessor(size={"shortest_edge": 24}, size_divisor=8)

    def resize(image):
        height, width = processor(image, return_tensors="pt").pixel_values.shape[2:]
        return image.resize((width, height), Image.Resampling.BICUBIC)

    expected = expected_rows(by_class(MADE), resize)
    done = store(tmp_path / "store", folders, image_size=24, step=8)
    ((summaries, _),) = done.chunks(100)
    torch.testing.assert_close(summaries, expected)
    assert {tuple(sides) for sides in summaries[:, -2:].tolist()} == {(24, 24), (40, 24), (24, 40), (72, 24)}


def test_batches_hold_equal_sizes_and_are_full_where_they_can_be(parquet, tmp_path):
    shapes = []
    store(
        tmp_path, parquet, image_size=24, step=8, encode=lambda images: shapes.append(images.shape) or encode(images)
    )
    shapes = shapes[1:]  # the first shows the width of a summary
    assert sum(shape[0] for shape in shapes) == 45 and max(shape[0] for shape in shapes) == 4
    # Blocks of 8, 7: per block and size one batch that is not full at most.
    assert sum(shape[0] < 4 for shape in shapes) <= 6 * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_are_rounded_once(dtype, parquet, tmp_path):
    ((exact, _),) = store(tmp_path / "exact", parquet).chunks(100)
    ((narrow, _),) = store(tmp_path / "narrow", parquet, dtype=dtype).chunks(100)
    assert narrow.dtype == getattr(torch, dtype) and torch.equal(narrow, exact.to(narrow.dtype))
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("exact", "narrow")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(45 * 14 * 2, abs=64)


def test_broken_files_are_counted_and_lose_no_label(tmp_path, caplog):
    data = write_folders(tmp_path / "data", "train", MADE, broken=20)
    done = store(tmp_path / "store", data, block_images=4)  # some blocks hold no readable image
    assert done.skipped == {"truncated": 20} and len(done) == 25
    assert sorted(done.labels.tolist()) == sorted(label for _, label in by_class(MADE[:25]))
    assert "skipped 20 of 45 images" in caplog.text
    expected = expected_rows(
        by_class(MADE[:25]), lambda image: ImageOps.fit(image, (32, 24), Image.Resampling.BICUBIC)
    )
    torch.testing.assert_close(torch.cat([summaries for summaries, _ in done.chunks(3)]), expected)


def slow_store(folder, data, delay):
    def slow(images):
        time.sleep(delay)
        return encode(images)

    store(folder, data, encode=slow)


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_killed_stores_end_with_the_same_bits_and_redo_no_block(kind, tmp_path, request):
    data = request.getfixturevalue(kind)
    store(tmp_path / "whole", data)
    killed = tmp_path / "killed"
    moment = random.Random(kind)
    before: dict[Path, int] = {}
    for _ in range(2):
        process = start_process(slow_store, killed, data, 0.25)
        deadline = time.monotonic() + 60
        while len(list(killed.glob("*.safetensors"))) == len(before):
            if not process.is_alive() or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(moment.random() / 2)
        process.kill()
        process.join()
        assert {path: path.stat().st_mtime_ns for path in before} == before
        before = {path: path.stat().st_mtime_ns for path in killed.glob("*.safetensors")}
    assert 2 <= len(before) < 6 and contents(killed) != contents(tmp_path / "whole")
    images = []
    store(killed, data, encode=lambda batch: images.extend(batch) or encode(batch))
    there = sum(len(load_file(path)["labels"]) for path in before)
    assert len(images) == 1 + 45 - there  # and one that shows the width of a summary
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in killed.glob("*.tmp"):  # what the kill cut off
        path.unlink()
    assert contents(killed) == contents(tmp_path / "whole")


def never(images):
    raise AssertionError("a finished store encodes nothing")


def counted_store(folder, data, counts):
    images = []
    store(folder, data, encode=lambda batch: images.extend(batch) or encode(batch))
    state = PartialState()
    (counts / str(state.process_index)).write_text(str(len(images) - state.is_main_process))  # one shows the width


@pytest.mark.parametrize("kind", ["folders", "parquet"])  # fewer parts than processes, and more
def test_two_processes_share_the_work_and_write_the_same_bits_as_one(kind, tmp_path, request):
    data = request.getfixturevalue(kind)
    store(tmp_path / "one", data)
    run_processes(counted_store, tmp_path / "two", data, tmp_path)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    counts = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert sum(counts) == 45 and min(counts) >= 15
    assert len(store(tmp_path / "two", data, encode=never)) == 45


def test_a_store_of_something_else_is_refused(folders, parquet, tmp_path):
    store(tmp_path, parquet)
    for change, message in [
        ({"settings": {**SETTINGS, "weights": "1"}}, "weights .'0' there, '1' here."),
        ({"image_size": (32, 32)}, r"image_size .\[24, 32\] there, \[32, 32\] here."),
        ({"image_size": 24}, "image_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"block_images": 9}, "block_images"),
        ({"data": folders}, "files"),
    ]:
        with pytest.raises(ValueError, match=f"holds summaries of something else; they differ in.*{message}"):
            store(tmp_path, **{"data": parquet, "encode": never, **change})
    assert len(store(tmp_path, parquet, encode=never)) == 45


def test_data_that_changed_is_something_else(tmp_path):
    data = write_parquet(tmp_path / "data", "train", MADE, files=2)
    store(tmp_path / "store", data)
    time.sleep(0.01)
    write_parquet(data, "train", MADE[:44], files=2)
    with pytest.raises(ValueError, match="differ in data.files"):
        store(tmp_path / "store", data, encode=never)


def test_the_need_of_disk_is_known_before_the_first_image(parquet, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = 45 * (14 * 4 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, free - 1))
    calls = []
    with pytest.raises(OSError, match="summaries of 45 images .14 wide, float32. need 0.00 GB more"):
        store(tmp_path, parquet, encode=lambda images: calls.append(images) or encode(images))
    assert len(calls) == 1 and not list(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, free))
    assert len(store(tmp_path, parquet)) == 45


def store_without_room(folder, data):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # no file may be longer
    with pytest.raises(OSError, match="could not be written.*make room on the disk"):
        store(folder, data)


def test_a_disk_that_is_full_keeps_what_is_there(parquet, tmp_path):
    store(tmp_path / "whole", parquet)
    process = start_process(store_without_room, tmp_path / "store", parquet)
    process.join(100)
    assert process.exitcode == 0 and not list((tmp_path / "store").glob("*.safetensors*"))
    store(tmp_path / "store", parquet)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_what_cannot_be_used_is_named(tmp_path):
    no_class = [(pixels, -1 if number == 3 else label) for number, (pixels, label) in enumerate(MADE[:5])]
    data = write_parquet(tmp_path / "unlabeled", "train", no_class, files=1, names=None)
    with pytest.raises(ValueError, match="-1 in column 'label'.*not a class index; expected an integer from 0"):
        store(tmp_path / "store", data)
    split = LabeledSplit(write_parquet(tmp_path / "labeled", "train", MADE[:5], files=1, names=None), "train")
    split.num_classes = 2
    with pytest.raises(ValueError, match="2 in column 'label'.*expected an integer from 0 to 1"):
        store_summaries(tmp_path / "store2", encode, SETTINGS, split, StoreConfig(**SMALL))
    with pytest.raises(ValueError, match="no readable image.*'truncated': 5"):
        store(tmp_path / "store3", write_folders(tmp_path / "broken", "train", MADE[:5], broken=5))
    empty = write_parquet(tmp_path / "empty", "train", [], files=1)
    with pytest.raises(ValueError, match="no readable image"):
        store(tmp_path / "store4", empty)
    with pytest.raises(ValueError, match="has no split 'test'"):
        LabeledSplit(empty, "test")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LabeledSplit(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"NaN or infinite summaries \(as float16\)"):
        store(tmp_path / "store5", data, encode=lambda images: 1e6 * encode(images), dtype="float16")
    with pytest.raises(ValueError, match="one row per image"):
        store(tmp_path / "store6", data, encode=lambda images: images)
    for change in ({"dtype": "int8"}, {"batch_size": 0}, {"image_size": (0, 3)}, {"num_workers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is|dtype of the store is 'int8'"):
            store(tmp_path / "store7", data, **change)


def test_a_source_that_breaks_off_is_noticed(tmp_path):
    """The card of a set on the Hub states how many images there are; here one more than its files hold."""
    data = write_parquet(tmp_path / "data", "train", MADE, files=1)
    splits = [{"name": "train", "num_bytes": 1, "num_examples": 46}]
    card = yaml.safe_dump({"dataset_info": {"splits": splits}})
    (data / "README.md").write_text(f"---\n{card}---\n")
    assert LabeledSplit(data, "train").stated == 46
    for _ in range(2):
        with pytest.raises(ValueError, match="should hold 46 images, but 45 were read"):
            store(tmp_path / "store", data)


def test_a_limit_takes_the_first(folders, tmp_path):
    split = LabeledSplit(folders, "train", limit=7)
    assert split.count() == 7
    done = store_summaries(tmp_path, encode, SETTINGS, split, StoreConfig(**SMALL))
    assert len(done) == 7 and done.labels.tolist() == [label for _, label in by_class(MADE)][:7]
    assert len(SummaryStore(tmp_path)) == 7
