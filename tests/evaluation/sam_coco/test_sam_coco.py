"""SAM-COCO on made COCO files: every kind of mask, literal counts, average precision, and a killed process."""

import importlib
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

from helpers.coco_files import Dataset, run_lengths
from helpers.paths import ROOT
from helpers.tiny_sam import as_batch, make_student, picture, some_boxes
from transformers_radio.evaluation.run import load_config
from transformers_radio.evaluation.sam_coco import measure as sam_coco
from transformers_radio.evaluation.sam_coco.coco import (
    decode_segmentation,
    load_annotations,
    load_detections,
)
from transformers_radio.evaluation.sam_coco.config import SamCocoConfig
from transformers_radio.evaluation.sam_coco.measure import evaluate_sam_coco, open_results
from transformers_radio.evaluation.sam_coco.prompting import (
    SamEncoder,
    StudentEncoder,
)


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def test_every_kind_of_segmentation_decodes_to_its_pixels(dataset):
    kinds = set()
    for entry in dataset.annotations:
        size, segmentation = dataset.sizes[entry["image_id"]], entry["segmentation"]
        counts = segmentation["counts"] if isinstance(segmentation, dict) else None
        kinds.add((type(segmentation).__name__, type(counts).__name__))
        if entry["id"] in dataset.truths:
            decoded = decode_segmentation(segmentation, size)
            assert decoded.dtype == torch.bool
            assert np.array_equal(decoded.numpy(), dataset.truths[entry["id"]])
    assert kinds == {("list", "NoneType"), ("dict", "list"), ("dict", "str")}
    with pytest.raises(ValueError, match=r"RLE mask is \[3, 4\], but its image is \[4, 4\]"):
        decode_segmentation({"size": [3, 4], "counts": [12]}, (4, 4))


@pytest.mark.parametrize("best_of_three", [False, True])
def test_score_is_the_literal_mean_over_annotations(dataset, sam, best_of_three):
    expected = dataset.literal_score(sam, best_of_three)
    config = dataset.config(best_of_three=best_of_three, prompts_per_chunk=1)
    found = evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "out" / "one.jsonl")
    assert found == {
        "mean_mask_iou": pytest.approx(expected, abs=1e-6),
        "images": 3,
        "annotations": 12,
        "crowd": 3,
        "empty": 4,
    }
    config.prompts_per_chunk = 3
    chunked = evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "out" / "three.jsonl")
    assert chunked["mean_mask_iou"] == pytest.approx(expected, abs=0.05)


def test_crowd_regions_count_where_they_are_asked_for(dataset, sam):
    without = dataset.literal_score(sam)
    dataset.count_crowds()
    expected = dataset.literal_score(sam)
    assert abs(expected - without) > 0.1
    config = dataset.config(crowds=True, prompts_per_chunk=1)
    found = evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "all.jsonl")
    assert found == {
        "mean_mask_iou": pytest.approx(expected, abs=1e-6),
        "images": 3,
        "annotations": 15,
        "crowd": 0,
        "empty": 4,
    }
    with pytest.raises(ValueError, match="another run; it differs in crowds .True there, False here"):
        evaluate_sam_coco(SamEncoder(sam), sam, dataset.config(), dataset.folder / "all.jsonl")


def test_only_the_encoder_computes_in_bfloat16(dataset, sam, monkeypatch):
    """Its embeddings are those of autocast; what SAM's decoder is given is float32."""
    given = []
    real = sam_coco.predict_masks

    def predict(sam, embedding, *arguments):
        given.append(embedding)
        return real(sam, embedding, *arguments)

    monkeypatch.setattr(sam_coco, "predict_masks", predict)
    config = dataset.config(dtype="bfloat16")
    evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "half.jsonl")
    image = as_batch(picture(dataset.sizes[3], 3))  # the first of the ids
    with torch.autocast("cpu", torch.bfloat16):
        expected = SamEncoder(sam)(image)
    assert given[0].dtype == torch.float32
    assert torch.equal(given[0], expected.float()) and not torch.equal(given[0], SamEncoder(sam)(image))
    with pytest.raises(ValueError, match="another run; it differs in dtype .'bfloat16' there, 'float32' here"):
        evaluate_sam_coco(SamEncoder(sam), sam, dataset.config(), dataset.folder / "half.jsonl")
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of"):
        evaluate_sam_coco(SamEncoder(sam), sam, dataset.config(dtype="int8"), dataset.folder / "half.jsonl")


class CountingEncoder(SamEncoder):
    def forward(self, images):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(images)


class KilledEncoder(SamEncoder):
    """kill -9 while the second image is encoded."""

    def forward(self, images):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def test_a_killed_run_goes_on_where_it_was(dataset, sam):
    results, config = dataset.folder / "results.jsonl", dataset.config()
    run = (KilledEncoder(sam), sam, config, results)
    process = multiprocessing.get_context("fork").Process(target=evaluate_sam_coco, args=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = results.read_bytes().count(b"\n") - 1
    assert done == 1
    with results.open("ab") as file:
        file.write(b'{"image_id": 12, "annot')  # what a kill during a write leaves
    encoder = CountingEncoder(sam)
    found = evaluate_sam_coco(encoder, sam, config, results)
    assert encoder.calls == 3 - done
    assert found == evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "whole.jsonl")
    assert sorted(results.read_bytes().splitlines()) == sorted(
        (dataset.folder / "whole.jsonl").read_bytes().splitlines()
    )
    assert evaluate_sam_coco(encoder, sam, config, results) == found and encoder.calls == 3 - done

    before = results.read_bytes()
    with pytest.raises(ValueError, match="another run; it differs in best_of_three .False there, True here"):
        evaluate_sam_coco(encoder, sam, dataset.config(best_of_three=True), results)
    with pytest.raises(ValueError, match="another run; it differs in weights"):
        evaluate_sam_coco(StudentEncoder(make_student(), sam), sam, config, results)
    assert results.read_bytes() == before


def test_detections_give_cocos_average_precision(dataset, sam):
    """One category has its object found below a false alarm: precision 1/2 at every recall. The other: all found."""
    size, dataset.annotations, boxes = (64, 64), [], some_boxes((64, 64), 2)
    predictor = SamPredictor(sam)
    predictor.set_image(picture(size, 12))
    for category, box in enumerate(boxes[:2], start=1):
        mask = predictor.predict(box=box, multimask_output=False)[0][0]
        dataset.add(12, run_lengths(mask), mask, box.tolist())
        dataset.annotations[-1]["category_id"] = category
    dataset.write()
    detections = [
        {"image_id": image_id, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image_id, category, score, (x0, y0, x1, y1) in [
            (12, 1, 0.5, boxes[0]),
            (7, 1, 0.9, [1, 1, 21, 21]),  # nothing is annotated there
            (12, 2, 0.3, boxes[1]),
            (7, 2, 0.1, [1, 1, 21, 21]),
        ]
    ]
    dataset.write(detections, "detections.json")
    config = dataset.config(detections=str(dataset.folder / "detections.json"), prompts_per_chunk=2)
    found = evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "results.jsonl")
    assert found["AP"] == pytest.approx(75, abs=0.01) and found["AP50"] == found["AP75"] == pytest.approx(75, abs=0.01)
    assert (found["images"], found["detections"]) == (2, 4)
    assert evaluate_sam_coco(SamEncoder(sam), sam, config, dataset.folder / "results.jsonl") == found


def test_results_file_keeps_whole_lines_and_refuses_others(tmp_path):
    path, settings = tmp_path / "new" / "results.jsonl", {"weights": "a", "image_size": 64}
    records, file = open_results(path, settings)
    assert records == {}
    with file:
        file.write(b'{"image_id": 5, "annotations": []}\n{"image_id": 6, "anno')
    records, file = open_results(path, settings)
    assert list(records) == [5]
    with file:
        file.write(b'{"image_id": 6, "annotations": []}\n')
    records, file = open_results(path, settings)
    file.close()
    assert list(records) == [5, 6] and len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="image_size .64 there, 32 here."):
        open_results(path, settings | {"image_size": 32})
    path.write_bytes(path.read_bytes()[:9])  # killed while the settings were written
    records, file = open_results(path, settings)
    file.close()
    assert records == {} and json.loads(path.read_text()) == {"settings": settings}
    for foreign in (b"my thesis", b"my thesis\nline\n", b'{"a": 1}\n', b"[1]\n"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="is not a results file"):
            open_results(path, settings)
        assert path.read_bytes() == foreign


def edited(part, index, **changes):
    def edit(content):
        content[part][index] |= changes

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (edited("annotations", 1, image_id=99), ValueError, "Annotation 101 belongs to image 99, which is not in"),
        (edited("images", 0, file_name="gone.png"), FileNotFoundError, "1 of 3 image files are missing, .*gone.png"),
        (edited("annotations", 0, bbox=[1, 2, 3]), ValueError, r"Annotation 100 has the bbox \[1, 2, 3\]"),
        (edited("annotations", 0, bbox=[1, 2, 3, float("nan")]), ValueError, "Annotation 100 has the bbox"),
        (lambda content: content["annotations"][2].pop("segmentation"), ValueError, "entry 102 .* lacks segmentation"),
        (lambda content: content["images"][1].pop("height"), ValueError, "entry 3 of its images lacks height"),
        (lambda content: content.pop("annotations"), ValueError, "it has no list of annotations"),
        (lambda content: [a.update(iscrowd=1) for a in content["annotations"]], ValueError, "no object .*19 crowd"),
    ],
)
def test_annotations_that_do_not_fit_are_named_before_work_starts(dataset, edit, error, message):
    content = dataset.content()
    edit(content)
    dataset.write(content)
    with pytest.raises(error, match=message):
        load_annotations(dataset.config())


def test_annotation_files_that_are_none(dataset):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        load_annotations(dataset.config(split="absent"))
    (dataset.folder / "annotations" / "instances_text.json").write_text("no json")
    with pytest.raises(ValueError, match="text.json is not a JSON file"):
        load_annotations(dataset.config(split="text"))
    dataset.write([1], "annotations/instances_list.json")
    with pytest.raises(ValueError, match="not a COCO annotation file"):
        load_annotations(dataset.config(split="list"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no detections"),
        ([{"image_id": 7, "bbox": [0, 0, 1, 1], "score": 1}], "Detection 0 .* lacks category_id"),
        ([{"image_id": 7, "category_id": 80, "bbox": [0, 0, 1, 1], "score": 1}], "has the category 80"),
        ([{"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}], "Detection 0 belongs to image 8"),
    ],
)
def test_detections_that_do_not_fit(dataset, content, message):
    dataset.write(content, "detections.json")
    with pytest.raises(ValueError, match=message):
        load_detections(dataset.config(detections=str(dataset.folder / "detections.json")))


def test_with_detections_every_annotation_must_have_its_image(dataset):
    dataset.write([{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}], "detections.json")
    dataset.annotations[1]["image_id"] = 99
    dataset.write()
    with pytest.raises(ValueError, match="Annotation 101 belongs to image 99, which is not in"):
        load_detections(dataset.config(detections=str(dataset.folder / "detections.json")))


def test_images_of_another_size_or_broken_ones_stop_the_run(dataset):
    images, crowds = load_annotations(dataset.config())
    assert [image.id for image in images] == [3, 7, 12] and crowds == 3
    assert torch.equal(images[0].read(), as_batch(picture((90, 60), 3))[0])
    assert images[1].boxes()[:2].tolist() == [[4, 6, 30, 20], [2, 3, 28, 26]]
    Image.fromarray(picture((60, 90))).save(images[0].path)
    with pytest.raises(ValueError, match="3.png is 60x90 pixels, but its annotations are made for 90x60"):
        images[0].read()
    images[0].path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3.png cannot be decoded \(undecodable\)"):
        images[0].read()


def test_a_missing_library_is_named_with_its_extra(dataset, sam, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for detections in (None, "detections.json"):
        with pytest.raises(ImportError, match=r'faster-coco-eval .*pip install "transformers_radio\[eval\]"'):
            evaluate_sam_coco(None, sam, dataset.config(detections=detections), dataset.folder / "results.jsonl")


def test_wrong_chunks_are_refused(dataset, sam):
    with pytest.raises(ValueError, match="prompts_per_chunk is 0"):
        evaluate_sam_coco(None, sam, dataset.config(prompts_per_chunk=0), dataset.folder / "results.jsonl")


def test_the_recipe_is_a_complete_config():
    config = load_config(SamCocoConfig, None, ROOT / "recipes/evaluation/coco2017.yaml", [])
    assert config.image_size == 1024 and not config.best_of_three and "CC BY 4.0" in config.license
    assert config.crowds  # as the paper's 77.18
