"""A result is known by what it depends on: not by where that lies or how it is described, and across versions."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, fields

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from helpers.classification_world import pictures, write_folders, write_parquet, write_tar
from helpers.coco_files import Dataset
from helpers.segmentation_set import LITTLE, describe, write_set
from helpers.tiny_sam import make_student
from transformers_radio.evaluation.models.encoder import VisionStudent
from transformers_radio.evaluation.paths import fingerprint_checkpoint
from transformers_radio.evaluation.run import run_task
from transformers_radio.evaluation.sam_coco import task as sam_coco
from transformers_radio.evaluation.segmentation import task as segmentation
from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.evaluation.segmentation.probe import FREE_FIELDS
from transformers_radio.evaluation.speed import task as throughput
from transformers_radio.evaluation.workspace import claim_folder

KNN = ["k=1", "num_workers=1", "batch_size=8"]


def never(*_, **__):
    raise AssertionError("what is finished is not measured again")


@pytest.fixture
def place(tmp_path):
    """Where all of a test lies; it is moved from `place` to `place / ".." / "moved"`."""
    make_student().save_pretrained(tmp_path / "here" / "student")
    return tmp_path / "here"


def move(place):
    shutil.move(place, place.with_name("moved"))
    return place.with_name("moved")


def digest_before(data, split):
    """What earlier versions knew files by: what `datasets` lists, with places and dates."""
    listed = datasets.load_dataset_builder(str(data)).config.data_files[split]
    digest = hashlib.blake2b(digest_size=16)
    for file in listed:
        digest.update(f"{file}\n".encode())
    digest.update(repr(listed.origin_metadata).encode())
    return digest.hexdigest()


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("write", [write_folders, write_tar, lambda *made: write_parquet(*made, files=2)])
def test_classification_moved_and_of_earlier_versions(write, place, monkeypatch):
    for split, seed in (("train", 0), ("validation", 1)):
        write(place / "birds", split, pictures(4, seed))
    run = lambda place, *more: run_task(  # noqa: E731
        "knn", [f"m={place / 'student'}"], str(place / "birds"), None, place / "out", [*KNN, *more]
    )
    (result,) = run(place)
    path = place / "out" / "m" / "knn.birds.json"

    def as_before(content):
        for name, split in (("bank", "train"), ("queries", "validation")):
            content["settings"][name]["files"] = digest_before(place / "birds", split)

    for store in (place / "out").rglob("store.json"):
        split = store.parent.name
        rewrite(
            store, lambda content, split=split: content["data"].update(files=digest_before(place / "birds", split))
        )
    monkeypatch.setattr(VisionStudent, "summary", never)
    new = path.read_text()
    rewrite(path, as_before)
    assert run(place)[0].metrics == result.metrics
    old = path.read_text()
    assert old != new
    moved = move(place)
    assert run(moved, "license=other words", "name=birds")[0].metrics == result.metrics
    path = moved / "out" / "m" / "knn.birds.json"
    path.write_text(new)
    assert run(moved) == [result]
    with pytest.raises(ValueError, match="it differs in k "):
        run(moved, "k=2")
    path.unlink()
    assert run(moved)[0].metrics == result.metrics  # from the summaries of the earlier version


def test_files_that_changed_are_others(place):
    for split, seed in (("train", 0), ("validation", 1)):
        write_folders(place / "birds", split, pictures(4, seed))
    run = lambda: run_task("knn", [str(place / "student")], str(place / "birds"), None, place / "out", KNN)  # noqa: E731
    run()
    file = next((place / "birds" / "train").rglob("*.png"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=r"it differs in bank.files \("):
        run()
    file.unlink()
    with pytest.raises(ValueError, match=r"it differs in bank.files \("):
        run()


def test_segmentation_moved_reworded_and_of_earlier_versions(place, monkeypatch):
    recipe = {"data": asdict(describe(write_set(place / "colours"))), "probe": LITTLE}
    OmegaConf.save(OmegaConf.create(recipe), place / "recipe.yaml")
    run = lambda place, *more: run_task(  # noqa: E731
        "segmentation",
        [f"m={place / 'student'}"],
        str(place / "colours"),
        place / "recipe.yaml",
        place / "out",
        ["probe.iterations=5", "probe.warmup_iterations=0", *more],
    )
    (result,) = run(place)

    def as_before(content):
        content["settings"]["text"] = None
        del content["settings"]["probe"]["power"]  # as if it was new

    path = place / "out" / "m" / "segmentation.colors.json"
    rewrite(path, as_before)
    monkeypatch.setattr(segmentation, "segmentation_probe", never)
    moved = move(place)
    again = run(moved, "data.license=other words", "data.source=elsewhere", "probe.num_workers=1")
    assert again[0].metrics == result.metrics
    with pytest.raises(ValueError, match=r"it differs in probe.seed \(0 there, 1 here\)"):
        run(moved, "probe.seed=1")


def test_segmentation_of_a_table_is_known_by_its_files(place, monkeypatch):
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    for split in ("train", "validation"):
        rows = {
            "image": [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))] * 2,
            "annotation": [Image.fromarray(rng.integers(0, 2, (40, 40), dtype=np.uint8))] * 2,
        }
        (place / "table").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "table" / f"{split}.parquet")
    splits = {split: [{"split": split}] for split in ("train", "validation")}
    data = {"name": "table", "path": str(place / "table"), "classes": ["a", "b"], "splits": splits}
    OmegaConf.save(OmegaConf.create({"data": data, "probe": LITTLE}), place / "recipe.yaml")
    run = lambda place: run_task(  # noqa: E731
        "segmentation",
        [f"m={place / 'student'}"],
        str(place / "table"),
        place / "recipe.yaml",
        place / "out",
        ["probe.iterations=2", "probe.warmup_iterations=0"],
    )
    run(place)
    monkeypatch.setattr(segmentation, "segmentation_probe", never)

    def as_before(content):
        for split in splits:
            rows = datasets.load_dataset(str(place / "table"), split=split)
            for column in ("image", "annotation"):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            rows = rows.select_columns(["image", "annotation"])
            digest = hashlib.blake2b(repr(rows._fingerprint).encode(), digest_size=16)
            content["settings"][f"{split} files"] = digest.hexdigest()

    path = place / "out" / "m" / "segmentation.table.json"
    new = path.read_text()
    rewrite(path, as_before)
    assert path.read_text() != new
    run(place)
    path.write_text(new)
    run(move(place))


def test_every_number_of_the_probe_counts_or_is_known_not_to():
    counted = {name.removeprefix("probe.") for name in (*segmentation.INFERENCE, *segmentation.TRAINING)}
    assert counted | set(FREE_FIELDS) == {field.name for field in fields(SegmentationConfig)}
    assert not counted & set(FREE_FIELDS)


def test_sam_coco_moved_and_reworded(place, sam_file, monkeypatch):
    Dataset(place)
    shutil.copy(sam_file, place / "sam.pth")
    run = lambda place, *more: run_task(  # noqa: E731
        "sam-coco",
        [f"m={place / 'student'}"],
        str(place),
        None,
        place / "out",
        [f"sam={place / 'sam.pth'}", "name=coco", *more],
    )
    (result,) = run(place)
    path = place / "out" / "m" / "sam-coco.coco.json"

    def as_before(content):
        content["settings"]["image_size"] = None  # SAM's own
        del content["settings"]["crowds"], content["settings"]["dtype"], content["kind"]

    rewrite(path, as_before)
    monkeypatch.setattr(sam_coco, "evaluate_sam_coco", never)
    moved = move(place)
    assert run(moved, "license=other words", "prompts_per_chunk=3")[0].metrics == result.metrics
    assert run(moved, f"image_size={result.resolution}")[0].metrics == result.metrics
    with pytest.raises(ValueError, match=r"it differs in best_of_three \(False there, True here\)"):
        run(moved, "best_of_three=true")
    with pytest.raises(ValueError, match=r"differs in crowds \(False there, True here\), dtype \('float32' there, "):
        run(moved, "crowds=true", "dtype=bfloat16")


def test_throughput_moved_and_of_earlier_versions(place, monkeypatch):
    shutil.copytree(place / "student", place / "other" / "student")
    run = lambda place: run_task(  # noqa: E731
        "throughput",
        [f"m={place / 'student'}", str(place / "other" / "student")],
        None,
        None,
        place / "out",
        ["batch_sizes=[1]", "repeats=1", "warmup=0"],
    )
    before = run(place)
    monkeypatch.setattr(throughput, "latencies", never)
    for path in (place / "out").rglob("throughput.*.json"):
        specs = [f"m={place / 'student'}", str(place / "other" / "student")]
        rewrite(path, lambda content, specs=specs: content["settings"].update(interleaved=specs))
    after = run(move(place))
    assert [result.metrics for result in after] == [result.metrics for result in before]


def test_features_and_resolution_moved(place, monkeypatch):
    for split, seed in (("train", 0), ("validation", 1)):
        write_folders(place / "birds", split, pictures(6, seed))
    tasks = {"features": ["images=2"], "resolution": ["sizes=[64]", "k=1", "feature_images=2"]}
    run = lambda place, task: run_task(  # noqa: E731
        task, [f"m={place / 'student'}"], str(place / "birds"), None, place / "out", tasks[task]
    )
    before = {task: run(place, task) for task in tasks}
    monkeypatch.setattr(VisionStudent, "features", never)
    monkeypatch.setattr(VisionStudent, "summary", never)
    path = place / "out" / "m" / "resolution.birds.json"

    def as_before(content):
        for name, split in (("bank", "train"), ("queries", "validation")):
            content["settings"][name]["files"] = digest_before(place / "birds", split)

    rewrite(path, as_before)
    moved = move(place)
    for task in tasks:
        assert run(moved, task)[0].metrics == before[task][0].metrics


def test_work_is_kept_where_only_what_does_not_count_differs(tmp_path):
    there = {"weights": "1", "model": "/old", "pretrain": {"epochs": 1, "images": "a"}}
    counted = ("weights", "pretrain.epochs")
    claim_folder(tmp_path / "work", there, counted, False)
    (tmp_path / "work" / "kept").touch()
    here = {"weights": "1", "model": "/new", "pretrain": {"epochs": 1, "images": "b"}}
    for overwrite in (False, True):
        claim_folder(tmp_path / "work", here, counted, overwrite)
        assert (tmp_path / "work" / "kept").exists()
    here["pretrain"]["epochs"] = 2
    with pytest.raises(ValueError, match=r"it differs in pretrain.epochs \(1 there, 2 here\)"):
        claim_folder(tmp_path / "work", here, counted, False)
    claim_folder(tmp_path / "work", here, counted, True)
    assert not (tmp_path / "work" / "kept").exists()


def test_a_checkpoint_is_known_by_its_files_wherever_they_lie(tmp_path):
    (tmp_path / "clip").mkdir()
    torch.save({}, tmp_path / "clip" / "weights.pt")
    one = fingerprint_checkpoint(f"open_clip:{tmp_path / 'clip'}")
    file = fingerprint_checkpoint(f"open_clip:ViT-B-32:{tmp_path / 'clip' / 'weights.pt'}")
    shutil.move(tmp_path / "clip", tmp_path / "elsewhere" / "clip")
    assert one == fingerprint_checkpoint(f"open_clip:{tmp_path / 'elsewhere' / 'clip'}")
    assert file == fingerprint_checkpoint(f"open_clip:ViT-B-32:{tmp_path / 'elsewhere' / 'clip' / 'weights.pt'}")
    os.utime(tmp_path / "elsewhere" / "clip" / "weights.pt", ns=(1, 1))
    assert one != fingerprint_checkpoint(f"open_clip:{tmp_path / 'elsewhere' / 'clip'}")
    for name in ("open_clip:ViT-H-14:dfn5b", "lmsys/vicuna-7b-v1.5", None):
        assert fingerprint_checkpoint(name) == name
