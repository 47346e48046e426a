"""SAM-COCO against segment_anything's own predictor, literal pixel counts, and a killed process."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from transformers_radio.evaluation.coco_data import (
    SamCocoConfig,
    decode_segmentation,
    load_annotations,
    load_detections,
    mask_library,
)
from transformers_radio.evaluation.prompted_masks import (
    SamEncoder,
    StudentEncoder,
    predict_masks,
    prompted_mask_iou,
)
from transformers_radio.evaluation.sam_coco import evaluate_sam_coco, open_results
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers.segment_anything import load_sam

SIDE, PATCH, WIDTH, NECK = 64, 8, 48, 32
SIZES = [(40, 56), (150, 90), (64, 64), (33, 64)]  # (H, W): smaller than SAM's input, larger, equal, and padded only


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory):
    """A tiny SAM of segment_anything's own classes, in its file format."""
    torch.manual_seed(0)
    sam = Sam(
        ImageEncoderViT(
            depth=2,
            embed_dim=WIDTH,
            img_size=SIDE,
            num_heads=4,
            patch_size=PATCH,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=3,
            out_chans=NECK,
        ),
        PromptEncoder(NECK, (SIDE // PATCH, SIDE // PATCH), (SIDE, SIDE), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=NECK,
            transformer=TwoWayTransformer(depth=2, embedding_dim=NECK, num_heads=8, mlp_dim=40),
            iou_head_hidden_dim=24,
        ),
    )
    with torch.no_grad():  # fresh weights hardly look at the image; larger ones draw different masks for each box
        for parameter in sam.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sam(sam_file):
    return load_sam(str(sam_file))


def make_student(feature_dim=WIDTH, **adaptor):
    torch.manual_seed(1)
    entry = {"summary_dim": None, "feature_dim": feature_dim, "hidden_dim": 24, "teacher": "tiny sam", **adaptor}
    config = RadioConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=PATCH,
        max_img_size=SIDE,
        num_registers=1,
        window_num_global=2,
        adaptors={"sam": entry},
    )
    return RadioModel(config).eval()


def picture(size, seed=0):
    """Smooth colours, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def as_batch(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def some_boxes(size, count=5, seed=0):
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * [size[1], size[0]]
    return np.sort(corners, axis=1).reshape(count, 4)  # x0, y0, x1, y1


def predictor_masks(predictor, boxes, best_of_three):
    """All boxes through SamPredictor at once: bool (N, H, W) and its IoU predictions, by its own argument names."""
    scaled = torch.as_tensor(predictor.transform.apply_boxes(boxes, predictor.original_size), dtype=torch.float)
    masks, predicted, _ = predictor.predict_torch(None, None, boxes=scaled, multimask_output=best_of_three)
    chosen = [int(np.argmax(row.numpy())) for row in predicted]
    return torch.stack([m[i] for m, i in zip(masks, chosen, strict=True)]), predicted.max(dim=1).values


def literal_iou(a, b):
    """Sets of pixels."""
    first = {tuple(p) for p in np.argwhere(np.asarray(a)).tolist()}
    second = {tuple(p) for p in np.argwhere(np.asarray(b)).tolist()}
    return len(first & second) / len(first | second)


# --- the encoder swap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best_of_three", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sam_itself_gives_its_predictors_masks_bit_for_bit(sam, size, best_of_three):
    image, boxes = picture(size), some_boxes(size)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    embedding = SamEncoder(sam)(as_batch(image))
    assert torch.equal(embedding, predictor.features)
    masks, predicted = predict_masks(sam, embedding, boxes, size, best_of_three)
    expected, expected_iou = predictor_masks(predictor, boxes, best_of_three)
    assert torch.equal(masks, expected) and torch.equal(predicted, expected_iou)
    assert masks.shape == (5, *size) and 0 < masks.float().mean() < 1
    assert len({mask.numpy().tobytes() for mask in masks}) == 5  # each box has its own mask
    for box, mask in zip(boxes, masks, strict=True):  # and as users call it, one box at a time
        alone, scores, _ = predictor.predict(box=box, multimask_output=best_of_three)
        assert (alone[scores.argmax()] != mask.numpy()).mean() < 1e-3


@pytest.mark.parametrize("features", ["trunk", "neck"])
def test_sams_own_features_from_a_student_give_the_predictors_masks_bit_for_bit(sam, monkeypatch, features):
    size = (40, 56)
    image, boxes = picture(size), some_boxes(size)
    trunk = []
    handle = sam.image_encoder.blocks[-1].register_forward_hook(lambda *caught: trunk.append(caught[2]))
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    handle.remove()
    # (1, h, w, C) and (1, C, h, w) -> (1, h * w, C)
    given = trunk[0].flatten(1, 2) if features == "trunk" else predictor.features.flatten(2).transpose(1, 2)
    student = make_student(WIDTH if features == "trunk" else NECK)
    output = SimpleNamespace(adaptors={"sam": SimpleNamespace(features=given)})
    monkeypatch.setattr(student, "forward", lambda pixel_values, adaptors, window_size: output)
    embedding = StudentEncoder(student, sam)(as_batch(image))
    masks, predicted = predict_masks(sam, embedding, boxes, size)
    expected, expected_iou = predictor_masks(predictor, boxes, False)
    assert torch.equal(masks, expected) and torch.equal(predicted, expected_iou)


@pytest.mark.parametrize("size", SIZES)
def test_a_student_that_computes_sams_trunk_is_sam(sam, monkeypatch, size):
    """The pixels that a student gets, normalised by SAM's statistics, are SAM's own input: scale, padding, range."""
    student = make_student()

    def forward(pixel_values, adaptors, window_size):
        assert pixel_values.shape == (1, 3, SIDE, SIDE) and adaptors == ["sam"]
        assert 0 <= pixel_values.min() and pixel_values.max() <= 1
        caught = []
        handle = sam.image_encoder.blocks[-1].register_forward_hook(lambda *args: caught.append(args[2]))
        sam.image_encoder(sam.preprocess(pixel_values * 255))
        handle.remove()
        return SimpleNamespace(adaptors={"sam": SimpleNamespace(features=caught[0].flatten(1, 2))})

    monkeypatch.setattr(student, "forward", forward)
    predictor = SamPredictor(sam)
    predictor.set_image(picture(size))
    embedding = StudentEncoder(student, sam)(as_batch(picture(size)))
    torch.testing.assert_close(embedding, predictor.features, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("feature_dim", "image_size"), [(WIDTH, 32), (NECK, 32), (WIDTH, 96)])
def test_another_grid_is_brought_to_sams_before_the_neck(sam, feature_dim, image_size):
    """Against Pillow: its resize of the picture, and when enlarging its bilinear filter of each channel."""
    student = make_student(feature_dim)
    image = picture((90, 150))
    small = Image.fromarray(image).resize((image_size, round(image_size * 90 / 150)), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (image_size, image_size))
    pixels = np.array(square, dtype=np.float32) + np.array([123.675, 116.28, 103.53], dtype=np.float32)
    pixels[: small.height] = np.array(small)
    pixel_values = torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]
    features = student(pixel_values).adaptors["sam"].features
    side = image_size // PATCH
    channels = features[0].T.reshape(feature_dim, side, side)  # row-major
    if side < 8:
        enlarge = [Image.fromarray(c.numpy()).resize((8, 8), Image.Resampling.BILINEAR) for c in channels]
        grid = torch.from_numpy(np.stack([np.array(c) for c in enlarge]))[None]
    else:
        grid = nn.functional.interpolate(channels[None], size=(8, 8), mode="bilinear")  # no antialiasing
    expected = sam.image_encoder.neck(grid) if feature_dim == WIDTH else grid
    embedding = StudentEncoder(student, sam, image_size=image_size)(as_batch(image))
    assert embedding.shape == (1, NECK, 8, 8)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_windows_reach_the_student(sam):
    student = make_student()
    image = picture((64, 64))
    pixel_values = as_batch(image).float() / 255
    embeddings = {}
    for window in (None, 0, 2, 4):
        features = student(pixel_values, window_size=window).adaptors["sam"].features
        grid = features.transpose(1, 2).unflatten(2, (8, 8))  # (1, h * w, C) -> (1, C, h, w)
        embeddings[window] = StudentEncoder(student, sam, window_size=window)(as_batch(image))
        torch.testing.assert_close(embeddings[window], sam.image_encoder.neck(grid))
    assert torch.equal(embeddings[None], embeddings[0])
    assert not torch.allclose(embeddings[0], embeddings[2], atol=1e-3)
    assert not torch.allclose(embeddings[2], embeddings[4], atol=1e-3)


def test_a_finer_adaptor_grid_is_understood(sam):
    student = make_student(upsample_factor=2)
    assert StudentEncoder(student, sam, image_size=32)(as_batch(picture((64, 64)))).shape == (1, NECK, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptor": "sam2"}, r"no adaptor 'sam2', it has \['sam'\]"),
        (
            {"student": make_student(20)},
            r"\(teacher: tiny sam\) has features of width 20, .* 48 before its neck and 32",
        ),
        ({"student": make_student(None, summary_dim=8)}, "features of width None"),
        ({"image_size": 60}, "image_size is 60, but the student takes multiples of 8: use 64"),
        ({"window_size": 3}, "the student with window_size 3 takes multiples of 24: use 72"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_at_once(sam, change, message):
    with pytest.raises(ValueError, match=message):
        StudentEncoder(**({"student": make_student(), "sam": sam} | change))


def test_equal_widths_are_ambiguous(sam):
    widths = SimpleNamespace(in_channels=WIDTH, out_channels=WIDTH)
    twin = SimpleNamespace(image_encoder=SimpleNamespace(img_size=SIDE, neck=[widths]))
    with pytest.raises(ValueError, match="width 48 both before and behind its neck"):
        StudentEncoder(make_student(), twin)


def test_only_byte_images_are_encoded(sam):
    with pytest.raises(ValueError, match=r"images are torch.float32 \(1, 3, 8, 8\); expected torch.uint8"):
        SamEncoder(sam)(torch.zeros(1, 3, 8, 8))


# --- small images in memory -----------------------------------------------------------------------------------------


def test_prompted_mask_iou_is_the_literal_mean(sam):
    images = torch.cat([as_batch(picture((64, 64), seed)) for seed in range(3)])
    instances = torch.zeros(3, 64, 64, dtype=torch.uint8)
    instances[0, 5:20, 8:30] = 1
    instances[0, 30:60, 10:50] = 2
    instances[2, :40, :33] = 2  # the first object of the last image is hidden
    boxes = [
        torch.tensor([[8, 5, 30, 20], [10, 30, 50, 60]]),
        torch.empty(0, 4),
        torch.tensor([[0] * 4, [0, 0, 33, 40]]),
    ]
    scores = []
    predictor = SamPredictor(sam)
    for image, box, instance in zip(images, boxes, instances, strict=True):
        predictor.set_image(image.permute(1, 2, 0).numpy())
        for number, one in enumerate(box.numpy(), start=1):
            if (instance == number).any():
                mask, _, _ = predictor.predict(box=one, multimask_output=False)
                scores.append(literal_iou(mask[0], instance == number))
    assert len(scores) == 3
    for batch_size in (1, 64):
        score = prompted_mask_iou(SamEncoder(sam), sam, images, boxes, instances, batch_size)
        assert score == pytest.approx(100 * np.mean(scores), abs=0.05)
    student = StudentEncoder(make_student(), sam, image_size=32)
    assert 0 <= prompted_mask_iou(student, sam, images, boxes, instances) <= 100


def test_the_quickstarts_sam_scores_as_its_own_measurement_says():
    from transformers_radio.quickstart.scenes import draw_scene
    from transformers_radio.quickstart.train_teachers import box_prompt_iou

    scenes = [draw_scene("validation", 5, index) for index in range(24)]
    data = SimpleNamespace(
        images=torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2),
        instances=torch.from_numpy(np.stack([scene.instances for scene in scenes])),
        boxes=[torch.tensor([list(one.box) for one in scene.objects]) for scene in scenes],
    )
    package = Path(sys.modules["transformers_radio"].__file__).parent
    checkpoint = package / "quickstart" / "teachers" / "sam" / "sam.pth"
    sam = load_sam(str(checkpoint))
    score = prompted_mask_iou(SamEncoder(sam), sam, data.images, data.boxes, data.instances)
    measured = box_prompt_iou(checkpoint, data)
    assert score == pytest.approx(measured["box_prompt_iou"], abs=0.2)
    assert score > measured["filled_box_iou"] + 5


@pytest.mark.parametrize(
    ("boxes", "instances", "message"),
    [
        ([torch.ones(1, 4)], torch.ones(2, 64, 64), "boxes of 1 images"),
        ([torch.ones(1, 4)] * 2, torch.ones(2, 32, 32), r"instances \(2, 32, 32\)"),
        ([torch.ones(1, 4)] * 2, torch.zeros(2, 64, 64), "No image has an object"),
    ],
)
def test_scenes_that_do_not_fit_together(sam, boxes, instances, message):
    with pytest.raises(ValueError, match=message):
        prompted_mask_iou(SamEncoder(sam), sam, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), boxes, instances)


# --- the metric -----------------------------------------------------------------------------------------------------


def test_metric_equals_a_literal_count():
    pytest.importorskip("evaluate")
    from transformers_radio.evaluation.mean_mask_iou import MeanMaskIoU

    generator = torch.Generator().manual_seed(0)
    pairs = [torch.rand(2, *size, generator=generator) > 0.6 for size in ((5, 7), (3, 4), (9, 2))]
    expected = 100 * np.mean([literal_iou(a, b) for a, b in pairs])
    metric = MeanMaskIoU()
    metric.add_batch(predictions=[a for a, _ in pairs[:2]], references=[b.tolist() for _, b in pairs[:2]])
    metric.add(prediction=pairs[2][0].numpy(), reference=pairs[2][1].numpy())
    metric.add(prediction=torch.ones(2, 2), reference=torch.zeros(2, 2))
    assert len(metric) == 3
    assert metric.compute() == {"mean_mask_iou": pytest.approx(expected, abs=1e-9), "masks": 3, "empty": 1}
    first = torch.stack([pairs[0][0]])
    assert metric.compute(predictions=first, references=first)["mean_mask_iou"] == 100  # starts anew
    with pytest.raises(ValueError, match="no mask to score"):
        metric.compute()
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\) and the reference \(3, 2\)"):
        metric.add(prediction=torch.ones(2, 3), reference=torch.ones(3, 2))


# --- COCO files -----------------------------------------------------------------------------------------------------


def run_lengths(mask):
    """COCO's uncompressed RLE: lengths of runs down the columns, background first."""
    counts, value = [0], False
    for pixel in np.asarray(mask).T.flatten():
        if pixel != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    """COCO's compressed RLE: from the fourth on differences to the count two before, in 5-bit groups with a sign."""
    text, counts = "", run_lengths(mask)["counts"]
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        last = False
        while not last:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if last else 32))
    return {"size": list(mask.shape), "counts": text}


def rectangle(size, x0, y0, x1, y1):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


class Dataset:
    """COCO-format files of four images; `truths` holds the literal mask of each annotation that counts."""

    def __init__(self, folder: Path):
        self.folder, self.annotations, self.truths, self.boxes = folder, [], {}, {}
        self.sizes = {7: (40, 56), 3: (90, 60), 12: (64, 64), 4: (30, 30)}  # image 4 has nothing to prompt for
        (folder / "images" / "deep").mkdir(parents=True)
        for image_id, size in self.sizes.items():
            Image.fromarray(picture(size, image_id)).save(folder / "images" / "deep" / f"{image_id}.png")
        rng = np.random.default_rng(0)
        for image_id, size in list(self.sizes.items())[:3]:
            blob = rectangle(size, 9, 9, 28, 25) & (rng.random(size) < 0.8)
            self.add(image_id, [polygon(4, 6, 30, 20)], rectangle(size, 4, 6, 30, 20), (4, 6, 30, 20))
            parts = rectangle(size, 2, 3, 9, 12) | rectangle(size, 20, 5, 28, 26)
            self.add(image_id, [polygon(2, 3, 9, 12), polygon(20, 5, 28, 26)], parts, (2, 3, 28, 26))
            self.add(image_id, run_lengths(blob), blob, (9, 9, 28, 25))
            self.add(image_id, compressed(~blob), ~blob, (0, 0, size[1], size[0]))
            self.add(image_id, run_lengths(blob), None, (9, 9, 28, 25), iscrowd=1)
            self.add(image_id, run_lengths(np.zeros(size)), None, (1, 1, 2, 2))
        self.add(12, [], None, (1, 1, 2, 2))
        self.write()

    def add(self, image_id, segmentation, truth, box, iscrowd=0):
        number = 100 + len(self.annotations)
        x0, y0, x1, y1 = box
        entry = {"id": number, "image_id": image_id, "category_id": 1 + number % 2, "iscrowd": iscrowd}
        entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": segmentation}
        entry |= {"area": 0 if truth is None else int(truth.sum())}
        self.annotations.append(entry)
        if truth is not None:
            self.truths[number], self.boxes[number] = truth, np.array(box)

    def content(self):
        images = [
            {"id": image_id, "file_name": f"deep/{image_id}.png", "height": size[0], "width": size[1]}
            for image_id, size in self.sizes.items()
        ]
        return {"images": images, "annotations": self.annotations, "categories": [{"id": 1}, {"id": 2}]}

    def write(self, content=None, name="instances.json"):
        (self.folder / name).write_text(json.dumps(self.content() if content is None else content))

    def config(self, **changes):
        files = {"images": str(self.folder / "images"), "annotations": str(self.folder / "instances.json")}
        return SamCocoConfig(**(files | changes))

    def literal_score(self, sam, best_of_three=False):
        """One predictor call and one set of pixels an annotation."""
        predictor, scores = SamPredictor(sam), {}
        for image_id, size in self.sizes.items():
            predictor.set_image(picture(size, image_id))
            for entry in self.annotations:
                number = entry["id"]
                if entry["image_id"] == image_id and number in self.truths:
                    masks, predicted, _ = predictor.predict(box=self.boxes[number], multimask_output=best_of_three)
                    scores[number] = literal_iou(masks[predicted.argmax()], self.truths[number])
        return 100 * np.mean(list(scores.values()))


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


@pytest.fixture
def coco_masks():
    try:
        return mask_library()
    except ImportError:
        pytest.skip("faster-coco-eval and pycocotools are not installed")


def test_every_kind_of_segmentation_decodes_to_its_pixels(dataset, coco_masks):
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
def test_score_is_the_literal_mean_over_annotations(dataset, sam, coco_masks, best_of_three):
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


class CountingEncoder(SamEncoder):
    def forward(self, images):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(images)


RUN = """
import sys, time
import torch
torch.set_num_threads(1)
from transformers_radio.evaluation.coco_data import SamCocoConfig
from transformers_radio.evaluation.prompted_masks import SamEncoder
from transformers_radio.evaluation.sam_coco import evaluate_sam_coco
from transformers_radio.teachers.segment_anything import load_sam

class SlowEncoder(SamEncoder):
    def forward(self, images):
        time.sleep(2)
        return super().forward(images)

checkpoint, images, annotations, results = sys.argv[1:]
sam = load_sam(checkpoint)
evaluate_sam_coco(SlowEncoder(sam), sam, SamCocoConfig(images, annotations), results)
"""


def test_a_killed_run_goes_on_where_it_was(dataset, sam, sam_file, coco_masks):
    results, config = dataset.folder / "results.jsonl", dataset.config()
    command = [sys.executable, "-c", RUN, sam_file, config.images, config.annotations, results]
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 300
        while not results.exists() or results.read_bytes().count(b"\n") < 2:  # the settings and one image
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    done = results.read_bytes().count(b"\n") - 1
    assert 1 <= done < 3
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
    with pytest.raises(ValueError, match="another run .best_of_three was False and is True"):
        evaluate_sam_coco(encoder, sam, dataset.config(best_of_three=True), results)
    with pytest.raises(ValueError, match="another run .weights was"):
        evaluate_sam_coco(StudentEncoder(make_student(), sam), sam, config, results)
    assert results.read_bytes() == before


def test_detections_give_cocos_average_precision(dataset, sam):
    """One category has its object found below a false alarm: precision 1/2 at every recall. The other: all found."""
    pytest.importorskip("faster_coco_eval")
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
    with pytest.raises(ValueError, match="image_size was 64 and is 32"):
        open_results(path, settings | {"image_size": 32})
    path.write_bytes(path.read_bytes()[:9])  # killed while the settings were written
    records, file = open_results(path, settings)
    file.close()
    assert records == {} and json.loads(path.read_text()) == {"settings": settings}
    for foreign in (b"my thesis", b"my thesis\nline\n", b'{"a": 1}\n', b"[1]\n"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="is no results file"):
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
        load_annotations(dataset.config(annotations=str(dataset.folder / "absent.json")))
    (dataset.folder / "text.json").write_text("no json")
    with pytest.raises(ValueError, match="text.json is no JSON file"):
        load_annotations(dataset.config(annotations=str(dataset.folder / "text.json")))
    dataset.write([1], "list.json")
    with pytest.raises(ValueError, match="no COCO annotation file"):
        load_annotations(dataset.config(annotations=str(dataset.folder / "list.json")))


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
        with pytest.raises(ImportError, match=r'faster-coco-eval .*pip install "transformers_radio\[evaluation\]"'):
            evaluate_sam_coco(None, sam, dataset.config(detections=detections), dataset.folder / "results.jsonl")


def test_wrong_chunks_are_refused(dataset, sam):
    with pytest.raises(ValueError, match="prompts_per_chunk is 0"):
        evaluate_sam_coco(None, sam, dataset.config(prompts_per_chunk=0), dataset.folder / "results.jsonl")


def test_the_recipe_is_a_complete_config():
    recipe = Path(__file__).parents[2] / "recipes" / "evaluation" / "coco2017.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SamCocoConfig), OmegaConf.load(recipe)))
    assert isinstance(config, SamCocoConfig)
    assert config.split in config.images and config.split in config.annotations
    assert config.image_size == 1024 and not config.best_of_three and "CC BY 4.0" in config.license
