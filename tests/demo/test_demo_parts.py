"""The parts of a student's page against what they are made of: Pillow, the teachers, SAM's own predictor."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.taught_student import CLIP, DINOV2, adaptor, save_taught_student
from transformers_radio.demo import parts
from transformers_radio.demo.models import load_models
from transformers_radio.demo.parts import (
    draw_mask,
    embed_for_masks,
    feature_panels,
    parse_labels,
    read_upload,
    score_labels,
    sides,
)
from transformers_radio.evaluation.pca import fit_pca, pca_rgb
from transformers_radio.teachers import build_teacher


def png_of(width, height):
    """A PNG whose header promises this many pixels, and which holds a few bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (png_of(9000, 9000), "too large: 9000 x 9000 pixels"),
        (png_of(65000, 65000), "too large"),
        (b"", "missing"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        (png_of(99, 99), "no image that can be shown"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_before_it_is_decoded(tmp_path, content, message):
    (tmp_path / "upload.png").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        read_upload(tmp_path / "upload.png")
    assert time.perf_counter() - started < 1


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "read_file", pytest.fail)
    with (tmp_path / "upload.jpg").open("wb") as file:
        file.truncate(parts.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 20 MB"):
        read_upload(tmp_path / "upload.jpg")


def test_an_upload_is_upright_and_of_bounded_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "upload.jpg", exif=exif)
    image = read_upload(tmp_path / "upload.jpg")
    assert image.size == (512, 1024) and image.mode == "RGB"
    Image.new("L", (30, 20)).save(tmp_path / "small.png")
    assert read_upload(tmp_path / "small.png").size == (30, 20)


def test_the_slider_has_the_students_sides(models):
    assert sides(models) == (8, 128, 8)


def as_pixels(image, side):
    square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("side", [64, 128])
def test_features_are_those_of_the_student_and_of_its_teachers(models, image, side):
    panels = feature_panels(models, image, side)
    assert [panel.title for panel in panels] == [
        "Student",
        *("clip, the teacher", "Student as clip", "dinov2, the teacher", "Student as dinov2"),
        *("sam, the teacher", "Student as sam"),
    ]
    with torch.no_grad():
        output = models.student.model(as_pixels(image, side))
    grid = (side // 8, side // 8)
    assert torch.equal(panels[0].colors, pca_rgb([output.features[0]], [grid])[0])
    teacher = build_teacher(*DINOV2.split(":", 1))
    taught = teacher(as_pixels(image, teacher.image_size))
    assert torch.equal(panels[3].colors, pca_rgb([taught.features[0]], [taught.grid])[0])
    in_its_colors = pca_rgb([output.adaptors["dinov2"].features[0]], [grid], fit_pca([taught.features[0]]))
    assert torch.equal(panels[4].colors, in_its_colors[0])
    assert panels[4].note == f"in the teacher's colors, {side // 8}\u00a0×\u00a0{side // 8} patches"
    timed = [panel.title for panel in panels if panel.milliseconds is not None]
    assert timed == ["Student", "clip, the teacher", "dinov2, the teacher", "sam, the teacher"]


def test_without_its_teacher_an_adaptor_has_its_own_colors(tmp_path, image):
    folder = save_taught_student(tmp_path / "student", lost=adaptor("open_clip:local:mine", 128))
    alone = load_models(folder)
    panels = feature_panels(alone, image, 64)
    assert [panel.title for panel in panels] == ["Student", "Student as lost"]
    assert "in its own colors" in panels[1].note
    with torch.no_grad():
        features = alone.student.model(as_pixels(image, 64)).adaptors["lost"].features[0]
    assert torch.equal(panels[1].colors, pca_rgb([features], [(8, 8)])[0])


@pytest.mark.parametrize("side", [0, 4, 60, 136, 1 << 30, -8])
def test_a_side_that_the_slider_does_not_have_is_refused(models, image, side):
    for show in (lambda: feature_panels(models, image, side), lambda: score_labels(models, image, side, ["cat"])):
        with pytest.raises(ValueError, match="expected a multiple of 8 from 8 to 128"):
            show()


def test_labels_are_scored_as_the_text_tower_says(models, image):
    labels = ["red circle", "striped star", "heart"]
    scores, milliseconds = score_labels(models, image, 64, labels)
    import open_clip

    folder = CLIP.replace("open_clip:package:", str(parts.Path(parts.__file__).parents[1]) + "/")
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        texts = clip.eval().encode_text(tokenizer([f"a photo of a {label}" for label in labels]))
        summary = models.student.model(as_pixels(image, 64), adaptors=["clip"]).adaptors["clip"].summary[0]
    cosines = {
        label: float(text @ summary / (text.norm() * summary.norm()))
        for label, text in zip(labels, texts, strict=True)
    }
    assert [score.label for score in scores] == sorted(labels, key=lambda label: -cosines[label])
    total = sum(math.exp(100 * cosine) for cosine in cosines.values())
    for score in scores:
        assert score.cosine == pytest.approx(cosines[score.label], abs=1e-4)
        assert score.share == pytest.approx(math.exp(100 * cosines[score.label]) / total, abs=0.02)
    assert milliseconds > 0


def test_labels_are_parted_and_bounded():
    assert parse_labels(" cat, dog\nold  dog,,cat ,\n") == ["cat", "dog", "old  dog"]
    assert len(parse_labels(",".join(map(str, range(50))))) == 50
    for text, message in [
        (" , ,\n", "no label"),
        (",".join(map(str, range(51))), "51 labels; at most 50"),
        ("x" * 101, "has 101 letters; at most 100"),
        ("x," * 10**6, "2,000,000 letters together"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_labels(text)


def test_masks_are_those_of_sams_predictor_with_the_students_features(models, image):
    from segment_anything import SamPredictor

    embedding, _ = embed_for_masks(models, image)
    predictor = SamPredictor(models.sam)
    predictor.features, predictor.is_image_set = embedding, True
    predictor.original_size = (80, 96)
    predictor.input_size = predictor.transform.get_preprocess_shape(80, 96, 128)
    masks, quality, _ = predictor.predict(np.array([[50, 20]]), np.array([1]), multimask_output=True)
    found, predicted, milliseconds = draw_mask(models, embedding, (80, 96), [(50, 20)])
    assert np.array_equal(found.numpy(), masks[quality.argmax()])
    assert predicted == pytest.approx(quality.max(), abs=1e-6) and milliseconds > 0
    masks, quality, _ = predictor.predict(box=np.array([10, 5, 70, 60]), multimask_output=False)
    for corners in ([(10, 5), (70, 60)], [(70, 60), (10, 5)], [(10, 60), (70, 5)]):
        found, predicted, _ = draw_mask(models, embedding, (80, 96), corners)
        assert np.array_equal(found.numpy(), masks[0]) and predicted == pytest.approx(quality[0], abs=1e-6)


@pytest.mark.parametrize(
    "clicks, message",
    [
        ([(96, 5)], "image of 96 x 80"),
        ([(5, -1)], "image of 96 x 80"),
        ([], "expected one or two"),
        ([(5, 5), (5, 60)], "two opposite corners"),
    ],
)
def test_clicks_that_mark_nothing_are_refused(models, clicks, message):
    with pytest.raises(ValueError, match=message):
        draw_mask(models, torch.zeros(1, 64, 8, 8), (80, 96), clicks)


def test_an_upload_may_be_any_common_format(tmp_path):
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 8), "blue").save(buffer, name)
        (tmp_path / "upload").write_bytes(buffer.getvalue())
        assert read_upload(tmp_path / "upload").size == (12, 8)
