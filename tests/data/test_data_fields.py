"""Of a sample the image alone is read: what lies beside it in tars and tables, and which of several columns it is."""

import base64
import logging
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import DataConfig, ImageStream, SourceError, count_images


def records_of(path, **fields) -> dict[str, bytes]:
    """key -> file of every image."""
    stream = ImageStream(DataConfig(str(path), num_workers=0, **fields), [16], batch_size=1, seed=0)
    source = stream.sources[""]
    return {key: source.read(image) for shard in range(len(source.shards)) for key, image in source.records(shard)}


def error_of(path, expected=ValueError, **fields) -> str:
    with pytest.raises(expected) as error:
        ImageStream(DataConfig(str(path), num_workers=0, **fields), [16], batch_size=1, seed=0).check()
    return str(error.value)


PHOTOS = [encode(picture(number)) for number in range(30)]


def test_every_extension_is_read_in_every_tar(tmp_path):
    names = ["jpg"] * 25 + ["png", "jpeg", "JPG", "webp", "Png"]  # the first 20 decide nothing for the rest
    write_tar(tmp_path / "0.tar", {f"{n:02}": {name: PHOTOS[n]} for n, name in enumerate(names)})
    write_tar(tmp_path / "1.tar", {f"{n:02}": {"tiff": PHOTOS[n], "mask.png": b"a mask"} for n in range(3)})
    write_tar(
        tmp_path / "2.tar", {"00": {"txt": b"x", "mask.png": b"a mask"}, "01": {"depth.png": b"", "gif": PHOTOS[1]}}
    )
    found = records_of(tmp_path)
    expected = {f"0.tar/{n:02}": data for n, data in enumerate(PHOTOS)} | {
        f"1.tar/{n:02}": PHOTOS[n] for n in range(3)
    }
    assert found == expected | {"2.tar/00": b"", "2.tar/01": PHOTOS[1]}  # a mask is never taken for the image
    only = records_of(tmp_path, image_column="jpg")
    assert {key for key, data in only.items() if data} == {
        f"0.tar/{n:02}" for n, name in enumerate(names) if name == "jpg"
    }
    assert count_images(DataConfig(str(tmp_path))) == len(expected) + 2


def test_of_two_images_of_a_later_sample_the_usual_one_is_read(tmp_path):
    samples = {f"{n:02}": {"jpg": PHOTOS[n]} for n in range(25)}
    write_tar(tmp_path / "0.tar", samples | {"25": {"png": b"a map", "jpg": PHOTOS[25]}})
    assert records_of(tmp_path) == {f"0.tar/{n:02}": PHOTOS[n] for n in range(26)}


def test_the_first_tars_may_be_empty(tmp_path):
    write_tar(tmp_path / "0.tar", {})
    write_tar(tmp_path / "1.tar", {"a": {"txt": b"no image"}})
    write_tar(tmp_path / "2.tar", {"b": {"jpg": PHOTOS[0]}})
    assert records_of(tmp_path) == {"1.tar/a": b"", "2.tar/b": PHOTOS[0]}
    (tmp_path / "2.tar").unlink()
    assert "found none among txt" in error_of(tmp_path)
    (tmp_path / "1.tar").unlink()
    assert "found none among no columns at all" in error_of(tmp_path)


@pytest.mark.parametrize(
    "extension", ["txt", "json", "cls", "npy", "npz", "cbor", "msgpack", "pth", "ten", "id", "txt.gz"]
)
def test_what_lies_beside_an_image_in_a_tar_is_not_looked_at(extension, tmp_path):
    contents = (b"1", b"{}", b"\xdf\xff\x00 no text, number or array", b"")
    samples = {f"{n:02}": {"jpg": PHOTOS[n], extension: contents[n % 4]} for n in range(12)}
    write_tar(tmp_path / "a.tar", samples)
    assert records_of(tmp_path) == {f"a.tar/{n:02}": PHOTOS[n] for n in range(12)}


def write(path, columns: dict, **options) -> None:
    pq.write_table(pa.table(columns), path, **options)


def test_other_columns_of_parquet_files_may_be_anything(tmp_path):
    """Of another type in each file, missing, or of a type that `datasets` does not know."""
    names = iter("abcdefgh")
    pairs = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    labels = [{"label": [1]}, {"label": ["dog"]}, {"label": [[1.0]], "more": [{"x": 1}]}, {}, {"label": pairs}]
    for label in labels:
        write(tmp_path / f"{next(names)}.parquet", {"image": [PHOTOS[0]], **label})
    write(tmp_path / f"{next(names)}.parquet", {"image": [{"bytes": PHOTOS[0], "path": "x.jpg"}], "label": [None]})
    write(tmp_path / f"{next(names)}.parquet", {"image": pa.array([PHOTOS[0]], pa.large_binary())})
    write(tmp_path / f"{next(names)}.parquet", {"image": [{"bytes": PHOTOS[0]}, {"bytes": None}]})
    assert list(records_of(tmp_path).values()) == [PHOTOS[0]] * 8 + [b""]


def test_the_first_parquet_file_may_have_no_rows(tmp_path):
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.null()), "label": pa.array([], pa.null())})
    write(tmp_path / "b.parquet", {"image": PHOTOS[:2], "label": ["x", "y"]})
    assert list(records_of(tmp_path).values()) == PHOTOS[:2]
    assert count_images(DataConfig(str(tmp_path))) == 2
    (tmp_path / "b.parquet").unlink()
    assert "found none among image, label" in error_of(tmp_path)


def test_a_later_parquet_file_with_another_column_of_images(tmp_path):
    write(tmp_path / "a.parquet", {"image": [PHOTOS[0]]})
    write(tmp_path / "b.parquet", {"photo": [PHOTOS[1]], "label": [1]})
    assert list(records_of(tmp_path).values()) == PHOTOS[:2]
    with pytest.raises(
        SourceError, match=r"'b\.parquet'.*data\.image_column='image'.*has the columns photo, label\.$"
    ):
        records_of(tmp_path, image_column="image")
    write(tmp_path / "b.parquet", {"left": [PHOTOS[1]], "right": [PHOTOS[2]]})
    with pytest.raises(SourceError, match=r"'b\.parquet'.*found several \(left, right\).*Set data\.image_column\.$"):
        records_of(tmp_path)
    write(tmp_path / "b.parquet", {"image": [7]})
    with pytest.raises(SourceError, match=r"'b\.parquet'.*column 'image' is of type int64; expected image files"):
        records_of(tmp_path)


def test_sounds_have_bytes_and_paths_too(tmp_path):
    media = {"bytes": PHOTOS[0], "path": "x"}
    schema = datasets.Features({"audio": datasets.Audio(), "photo": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"audio": [media], "photo": [media]}, schema=schema), tmp_path / "a.parquet")
    assert records_of(tmp_path) == {"a.parquet/0": PHOTOS[0]}


def test_base64_text_is_refused_and_never_printed(tmp_path):
    for start in ("", "data:image/jpeg;base64,"):
        texts = [start + base64.b64encode(photo).decode() for photo in PHOTOS]
        write(tmp_path / "a.parquet", {"image": [None, *texts], "caption": ["x"] * 31})
        for message in (error_of(tmp_path), error_of(tmp_path, image_column="image")):
            assert "Column 'image' holds images as base64 text" in message and "base64.b64decode" in message
            assert len(message) < 400
    write(tmp_path / "a.parquet", {"image": [base64.b64encode(photo) for photo in PHOTOS]})
    assert "30 undecodable" in error_of(tmp_path) and "base64.b64decode" in error_of(tmp_path)
    write(tmp_path / "a.parquet", {"image": ["some long text " * 1000] * 3})
    message = error_of(tmp_path, image_column="image")
    assert "none of the first 3 images can be used (3 missing)" in message and len(message) < 400


def test_what_a_table_holds_in_place_of_images_is_said(tmp_path):
    write(tmp_path / "a.parquet", {"url": ["https://example.org/a.jpg"], "caption": ["x"]})
    message = error_of(tmp_path)
    assert "found none among url, caption" in message and "img2dataset" in message
    assert "Column 'url' holds addresses such as 'https://example.org/a.jpg'" in message
    write(tmp_path / "a.parquet", {"file_name": ["photos/a.JPG"]})
    assert "'file_name' names files such as 'photos/a.JPG': set data.path to the folder" in error_of(tmp_path)
    write(tmp_path / "a.parquet", {"images": [[PHOTOS[0], PHOTOS[1]]]})
    for message in (error_of(tmp_path), error_of(tmp_path, image_column="images")):
        assert "'images' holds lists of images: write the table anew with one image in each row" in message
    write(tmp_path / "a.parquet", {"image": [1.5]})
    assert "'image' is of type double; expected image files" in error_of(tmp_path, image_column="image")


def test_folders_of_save_to_disk_are_refused_with_the_line_that_helps(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": photo, "path": None} for photo in PHOTOS]
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "splits")
    for folder, saved in (("plain", "plain"), ("splits", "splits/train")):
        message = error_of(tmp_path / folder, FileNotFoundError)
        line = f"datasets.load_from_disk('{tmp_path / saved}').to_parquet('train.parquet')"
        assert "as save_to_disk writes it" in message and message.endswith(line)
    (tmp_path / "new").mkdir()
    eval(line.replace("'train.parquet'", repr(str(tmp_path / "new" / "train.parquet"))))
    assert list(records_of(tmp_path / "new").values()) == PHOTOS


def test_work_per_file_is_done_when_its_turn_comes(tmp_path):
    """Opening many tars opens the first alone, and reading a shard opens that one, however many there are."""
    for number in range(400):
        write_tar(tmp_path / f"{number:04}.tar", {"a": {"jpg": PHOTOS[0]}})
    events = []
    enabled = True

    def hook(event, arguments):  # cannot be taken off again
        if enabled and event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(str(tmp_path)):
            events.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    for path in (tmp_path, tmp_path / "*.tar", tmp_path / "{0000..0399}.tar"):
        events.clear()
        source = ImageStream(DataConfig(str(path), num_workers=0, lanes=50), [16], 1, 0).sources[""]
        assert len(source.shards) == 400
        assert [file for event, file in events if event == "open"] == [str(tmp_path / "0000.tar")]
        assert len(events) == 2  # and one look at the folder
        events.clear()
        assert [key for key, _ in source.records(399)] == ["0399.tar/a"]
        assert events == [("open", str(tmp_path / "0399.tar"))]
    enabled = False


def test_skipped_samples_of_a_local_tar_are_not_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{n:02}": {"jpg": PHOTOS[n]} for n in range(24)})
    source = ImageStream(DataConfig(str(tmp_path), num_workers=0), [16], 1, 0).sources[""]
    for part in range(5):
        found = list(source.records(0, source.part(0, part, 5)))
        assert found == [(f"a.tar/{n:02}", PHOTOS[n]) for n in range(part, 24, 5)]


def test_a_caption_in_the_way_of_nothing_is_logged(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", {f"{n:02}": {"jpg": PHOTOS[n], "txt": b"\xdf"} for n in range(4)})
    with caplog.at_level(logging.WARNING):
        stream = ImageStream(DataConfig(str(tmp_path), num_workers=0), [16], 4, 0)
        batch = next(iter(stream))
    assert caplog.text == "" and batch.skipped == {} and np.unique(batch.keys).size == 4
