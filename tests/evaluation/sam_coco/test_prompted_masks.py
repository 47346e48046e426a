"""SAM's decoder behind the student: against segment_anything's own predictor and literal pixel counts."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from torch import nn

from helpers.tiny_sam import (
    NECK,
    PATCH,
    SIDE,
    SIZES,
    WIDTH,
    as_batch,
    literal_iou,
    make_student,
    picture,
    predictor_masks,
    some_boxes,
)
from transformers_radio.evaluation.sam_coco.measure import prompted_mask_iou
from transformers_radio.evaluation.sam_coco.prompting import (
    SamEncoder,
    StudentEncoder,
    predict_masks,
    predict_masks_at_points,
)
from transformers_radio.teachers.segment_anything import load_sam


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


@pytest.mark.parametrize("size", SIZES)
def test_points_give_the_best_of_the_predictors_three_masks(sam, size):
    image = picture(size)
    points = np.random.default_rng(0).uniform(0, 1, (4, 2)) * [size[1], size[0]]
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, predicted = predict_masks_at_points(sam, predictor.features, points, size)
    assert masks.shape == (4, *size) and predicted.shape == (4,)
    for point, mask, quality in zip(points, masks, predicted, strict=True):
        three, scores, _ = predictor.predict(point[None], np.array([1]), multimask_output=True)
        assert quality.item() == pytest.approx(scores.max(), abs=1e-5)
        assert (three[scores.argmax()] != mask.numpy()).mean() < 1e-3


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
    output = SimpleNamespace(adaptors={"sam": SimpleNamespace(features=given, grid=(8, 8))})
    monkeypatch.setattr(student, "forward", lambda pixel_values, adaptors: output)
    embedding = StudentEncoder(student, sam)(as_batch(image))
    masks, predicted = predict_masks(sam, embedding, boxes, size)
    expected, expected_iou = predictor_masks(predictor, boxes, False)
    assert torch.equal(masks, expected) and torch.equal(predicted, expected_iou)


@pytest.mark.parametrize("size", SIZES)
def test_a_student_that_computes_sams_trunk_is_sam(sam, monkeypatch, size):
    """The pixels that a student gets, normalized by SAM's statistics, are SAM's own input: scale, padding, range."""
    student = make_student()

    def forward(pixel_values, adaptors):
        assert pixel_values.shape == (1, 3, SIDE, SIDE) and adaptors == ["sam"]
        assert 0 <= pixel_values.min() and pixel_values.max() <= 1
        caught = []
        handle = sam.image_encoder.blocks[-1].register_forward_hook(lambda *args: caught.append(args[2]))
        sam.image_encoder(sam.preprocess(pixel_values * 255))
        handle.remove()
        return SimpleNamespace(adaptors={"sam": SimpleNamespace(features=caught[0].flatten(1, 2), grid=(8, 8))})

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
    with pytest.raises(ValueError, match="width 48 both before and after its neck"):
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


def test_metric_equals_a_literal_count():
    from transformers_radio.evaluation.sam_coco.metrics import MeanMaskIoU

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
