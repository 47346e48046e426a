"""Every kind of source, from files on disk to batches, and what is said when it cannot be read."""

import io
import os
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import DataConfig, ImageStream

COUNT = 24


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    kinds = ("JPEG", "PNG", "WEBP")
    return {f"{number:03}": encode(picture(number), kinds[number % 3]) for number in range(COUNT)}


def first_epoch(config: DataConfig, resolution: int = 24) -> dict[str, torch.Tensor]:
    """key -> image of one whole pass, each exactly once."""
    stream = ImageStream(config, [resolution], batch_size=4, seed=3)
    stream.check()
    seen: dict[str, torch.Tensor] = {}
    for batch in stream:
        for key, epoch, image in zip(batch.keys, batch.epochs, batch.images[resolution], strict=True):
            if epoch == 0:
                assert key not in seen
                seen[key] = image
        if all(lane["epoch"] > 0 for lane in stream.state_dict()["lanes"].values()):
            break
    stream.close()
    return seen


def whole_image(path: str, **fields) -> DataConfig:
    """Crops of the whole 40 x 32 picture, so that a test can tell what each batch must hold."""
    return DataConfig(
        path, **{"num_workers": 0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.25, 1.25), "shuffle_window": 5, **fields}
    )


def check_images(found: dict[str, torch.Tensor], files: dict[str, bytes]) -> None:
    assert found.keys() == files.keys()
    for key, data in files.items():
        pixels = F.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        assert torch.equal(found[key], F.resize(pixels, [24, 24], InterpolationMode.BICUBIC, antialias=True))


def test_folder_of_images(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("0*")}
    assert len(files) == 36
    check_images(first_epoch(whole_image(str(folder))), files)
    pattern = first_epoch(whole_image(str(folder / "[ab]" / "**" / "*.png")))
    assert pattern.keys() == {name for name in files if name.endswith(".png") and name[0] in "ab"}


@pytest.mark.parametrize("where", ["folder", "file", "pattern", "url"])
def test_webdataset(where, photos, tmp_path):
    root = tmp_path / "with [brackets] and spaces"
    keys = sorted(photos)
    for part in range(3):
        samples = {
            # Two more images, text, and JSON whose fields differ from sample to sample.
            key: {
                "jpg": photos[key],
                "mask.png": encode(picture(99), "PNG"),
                "txt": b"a caption",
                "json": b'{"a": 1}' if number % 2 else b'{"b": ["x"], "a": "1"}',
            }
            for number, key in enumerate(keys[part::3])
        }
        write_tar(root / f"train-{part:06}.tar", samples)
    write_tar(root / "validation-000000.tar", {"other": {"jpg": photos["000"]}})
    files = {f"train-{i % 3:06}.tar/{key}": photos[key] for i, key in enumerate(keys)}
    if where == "folder":
        check_images(first_epoch(whole_image(str(root))), files)
    elif where == "file":
        files = {key: data for key, data in files.items() if "000001" in key}
        check_images(first_epoch(whole_image(str(root / "train-000001.tar"))), files)
    elif where == "url":
        shutil.copy(root / "train-000001.tar", tmp_path)
        found = first_epoch(whole_image(f"file://{tmp_path}/train-000001.tar", num_workers=2))
        check_images(found, {key: data for key, data in files.items() if "000001" in key})
    else:
        plain = tmp_path / "plain"
        shutil.copytree(root, plain)
        check_images(first_epoch(whole_image(str(plain / "train-*.tar"))), files)


@pytest.mark.parametrize("form", ["binary", "struct", "hugging face"])
def test_parquet(form, photos, tmp_path):
    for part in range(2):
        blobs = list(photos.values())[part * 12 : part * 12 + 12]
        path = tmp_path / f"part-{part}.parquet"
        if form == "binary":
            pq.write_table(pa.table({"content": blobs, "label": list(range(12))}), path, row_group_size=5)
        elif form == "struct":
            pq.write_table(pa.table({"img": [{"bytes": blob, "path": None} for blob in blobs]}), path)
        else:
            features = datasets.Features({"image": datasets.Image(), "thumbnail": datasets.Image()})
            rows = {"image": [{"bytes": blob, "path": "x.jpg"} for blob in blobs], "thumbnail": [None] * 12}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    files = {f"part-{i // 12}.parquet/{i % 12}": blob for i, blob in enumerate(photos.values())}
    check_images(first_epoch(whole_image(str(tmp_path))), files)
    check_images(first_epoch(whole_image(str(tmp_path / "*.parquet"), lanes=4, num_workers=2)), files)


def test_hub_dataset(photos, tmp_path, monkeypatch):
    """The Hub is out of a test's reach: the builder is asked for as it would be, and reads a local copy."""
    (tmp_path / "data").mkdir()
    rows = {"image": [{"bytes": blob, "path": None} for blob in photos.values()]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    load, asked = datasets.load_dataset_builder, []

    def from_local_copy(path, name=None, **arguments):
        asked.append((path, name, arguments))
        return load(str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_local_copy)
    found = first_epoch(whole_image("owner/pictures", name="small", split="test"))
    assert asked == [("owner/pictures", "small", {})]
    check_images(found, {f"test-00000-of-00001.parquet/{i}": blob for i, blob in enumerate(photos.values())})
    with pytest.raises(ValueError, match="split 'train'"):
        ImageStream(whole_image("owner/pictures", split="train"), [8], 1, 0)


def test_a_split_is_a_subfolder_or_a_prefix_of_file_names(photos, tmp_path):
    for number, (key, data) in enumerate(photos.items()):
        path = tmp_path / "images" / ("train" if number % 2 else "val") / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    keys = first_epoch(whole_image(str(tmp_path / "images"), split="val")).keys()
    assert keys == {f"val/{key}.jpg" for key in sorted(photos)[::2]}
    write_tar(tmp_path / "tars" / "000.tar", {key: {"jpg": data} for key, data in photos.items()})
    write_tar(tmp_path / "tars" / "val-000.tar", {key: {"jpg": data} for key, data in list(photos.items())[:8]})
    assert len(first_epoch(whole_image(str(tmp_path / "tars"), split="val"))) == 8
    assert {key.split("/")[0] for key in first_epoch(whole_image(str(tmp_path / "tars")))} == {"000.tar"}
    with pytest.raises(ValueError, match="no split 'test'"):
        ImageStream(whole_image(str(tmp_path / "tars"), split="test"), [8], 1, 0)
    with pytest.raises(ValueError, match="no split 'test'.*Its sub-folders are train, val: set data.split to one of"):
        ImageStream(whole_image(str(tmp_path / "images"), split="test"), [8], 1, 0)


def test_a_folder_is_dealt_out_evenly_not_sub_folder_by_sub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_radio.data.source.FILES_PER_FOLDER_SHARD", 8)
    blob = encode(picture(0))
    for number in range(64):
        path = tmp_path / f"class{number // 32}" / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
    stream = ImageStream(whole_image(str(tmp_path), shuffle_window=8), [8], batch_size=8, seed=0)
    batches = iter(stream)
    for _ in range(8):  # each batch is one shard
        assert sum(key.startswith("class0") for key in next(batches).keys) == 4


def error_of(path, expected=ValueError, **fields) -> str:
    with pytest.raises(expected) as error:
        ImageStream(whole_image(str(path), **fields), [8], batch_size=4, seed=0).check()
    return str(error.value)


def test_paths_that_hold_nothing(tmp_path, photos):
    assert f"'{tmp_path}/nope' does not exist" in error_of(tmp_path / "nope", FileNotFoundError)
    assert "found no images" in error_of(tmp_path, FileNotFoundError)
    assert "found no images" in error_of(tmp_path / "*.tar", FileNotFoundError)
    (tmp_path / "notes.txt").write_text("no image")
    assert "among 1 files" in error_of(tmp_path, FileNotFoundError)
    (tmp_path / "a.jpg").write_bytes(photos["000"])
    write_tar(tmp_path / "b.tar", {"x": {"jpg": photos["000"]}})
    message = error_of(tmp_path)
    assert "1 for imagefolder" in message and "1 for webdataset" in message and "pattern" in message
    (tmp_path / "b.tar").write_bytes(b"")
    assert "b.tar" in error_of(tmp_path / "b.tar") or "empty" in error_of(tmp_path / "b.tar")


def test_a_path_that_is_neither_local_nor_reachable(monkeypatch):
    monkeypatch.setattr("transformers_radio.data.listing.FIRST_OPENING_SECONDS", 0)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    message = error_of("pictures/of_cats")
    assert "'pictures/of_cats'" in message and "no such local path exists" in message and "Couldn't reach" in message


def test_tars_with_several_image_formats(photos, tmp_path):
    samples = {key: {("jpg", "png", "webp")[int(key) % 3]: data} for key, data in photos.items()}
    write_tar(tmp_path / "a.tar", samples)
    check_images(first_epoch(whole_image(str(tmp_path))), {f"a.tar/{key}": data for key, data in photos.items()})


def test_image_column(tmp_path, photos):
    write_tar(tmp_path / "two.tar", {key: {"jpg": data, "png": data} for key, data in photos.items()})
    message = error_of(tmp_path / "two.tar")
    assert "several (jpg, png)" in message and "data.image_column" in message
    assert len(first_epoch(whole_image(str(tmp_path / "two.tar"), image_column="png"))) == COUNT
    message = error_of(tmp_path / "two.tar", image_column="image")
    assert "'image'" in message and "the columns jpg, png." in message
    pq.write_table(pa.table({"caption": ["a"], "label": [1]}), tmp_path / "text.parquet")
    message = error_of(tmp_path / "text.parquet")
    assert "found none among caption, label" in message
    message = error_of(tmp_path / "text.parquet", image_column="caption")
    assert "none of the first 1 images can be used" in message and "'caption'" in message


@pytest.mark.parametrize("keys", [("my.photo.001", "my.photo.002"), ("a.001", "b.002")])
def test_names_with_dots_of_their_own_are_to_be_changed(keys, tmp_path, photos):
    write_tar(tmp_path / "dots.tar", {key: {"jpg": photos["000"]} for key in keys})
    message = error_of(tmp_path / "dots.tar")
    assert "A sample's key ends at the first dot" in message and "rename the files" in message
    write_tar(tmp_path / "column.tar", {f"{key}.rgb": {"jpg": data} for key, data in photos.items()})
    assert len(first_epoch(whole_image(str(tmp_path / "column.tar")))) == COUNT  # the column rgb.jpg of all


def test_check_reports_sources_without_one_usable_or_enough_images(tmp_path, photos):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"<html>")
    message = error_of(tmp_path)
    assert "3 undecodable" in message and "0.jpg, 1.jpg, 2.jpg" in message
    (tmp_path / "3.jpg").write_bytes(photos["000"])
    ImageStream(whole_image(str(tmp_path)), [8], batch_size=4, seed=0).check()  # one usable image is enough
    (tmp_path / "0.jpg").unlink()
    message = error_of(tmp_path)
    assert "holds 3 images" in message and "needs 4" in message


def test_a_shard_that_ends_early_stops_the_run_with_its_name(tmp_path, photos):
    write_tar(tmp_path / "whole-000.tar", {key: {"jpg": data} for key, data in photos.items()})
    data = (tmp_path / "whole-000.tar").read_bytes()
    (tmp_path / "whole-001.tar").write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(RuntimeError, match=r"whole-001\.tar.*ReadError"):
        for _ in ImageStream(whole_image(str(tmp_path), num_workers=2), [8], batch_size=4, seed=0):
            pass


def test_images_missing_from_a_record_are_counted(tmp_path, photos):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    samples = {key: {"jpg": data, "txt": b"x"} for key, data in photos.items()}
    samples["007"].pop("jpg")
    write_tar(tmp_path / "a.tar", samples)
    stream = ImageStream(whole_image(str(tmp_path / "a.tar"), max_skipped_share=1), [8], batch_size=23, seed=0)
    batch = next(iter(stream))
    assert batch.skipped in ({}, {"missing": 1}) and "a.tar/007" not in batch.keys
    assert next(iter(stream)).skipped["missing"] >= 1
    blobs = list(photos.values())
    pq.write_table(pa.table({"image": [None, *blobs]}), tmp_path / "b.parquet")
    found = first_epoch(whole_image(str(tmp_path / "b.parquet"), max_skipped_share=1))
    assert np.unique([key.split("/")[1] for key in found]).size == COUNT and "b.parquet/0" not in found


def test_paths_in_parquet_files_stay_below_their_root(tmp_path):
    """Relative ones start there; folders, devices, pipes and whatever lies elsewhere are not opened."""
    root = tmp_path / "data"
    (root / "photos").mkdir(parents=True)
    for name in ("data/photos/0.png", "data/photos/1.png", "outside.png"):
        (tmp_path / name).write_bytes(encode(picture(len(name)), "PNG"))
    os.mkfifo(root / "pipe.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "locked.png").symlink_to("locked.png")
    inside = ["photos/0.png", str(root / "photos/1.png"), f"file://{root}/photos/0.png"]
    outside = ["../outside.png", str(tmp_path / "outside.png"), f"file://{tmp_path}/outside.png", "/dev/zero"]
    outside += [f"simplecache::file://{tmp_path}/outside.png"]
    nothing = ["photos", "pipe.png", "zero.png", "locked.png", "gone.png", "x" * 300 + ".png", "photos/0.png/x.png"]
    records = [{"bytes": None, "path": path} for path in inside + outside + nothing]
    pq.write_table(pa.table({"image": records}), root / "train.parquet")
    config = whole_image(str(root / "train.parquet"), max_skipped_share=1.0)
    assert set(first_epoch(config)) == {f"train.parquet/{row}" for row in range(3)}
    config.image_root = str(tmp_path)
    assert set(first_epoch(config)) == {f"train.parquet/{row}" for row in (1, 2, 4, 5)}
    pq.write_table(pa.table({"image": records[3:]}), root / "train.parquet")
    config.image_root = None
    with pytest.raises(ValueError, match=r"12 missing.*Paths must lead below .*/data', or else set data.image_root"):
        first_epoch(config)


def test_pipes_and_devices_in_a_folder_are_skipped(tmp_path):
    photos = {f"{number}.png" for number in range(4)}
    for name in photos:
        (tmp_path / name).write_bytes(encode(picture(1), "PNG"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert set(first_epoch(whole_image(str(tmp_path), max_skipped_share=1.0))) == photos
