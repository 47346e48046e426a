"""Text space against open_clip's own pooling; a whole split whose colors are the classes' words."""

from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from transformers_radio.evaluation.segmentation.config import SegmentationConfig, SegmentationData, SplitSource
from transformers_radio.evaluation.segmentation.inference import encode_grid
from transformers_radio.evaluation.segmentation.words import (
    PatchProjection,
    TextHead,
    dense_zero_shot,
    projected_patches,
    summary_head_patches,
)
from transformers_radio.modeling import RadioConfig, RadioModel

torch.set_num_threads(1)
CLIP = str(resources.files("transformers_radio") / "quickstart" / "teachers" / "clip")


@pytest.fixture(scope="module")
def student():
    adaptors = {
        "clip": {"summary_dim": 128, "feature_dim": 192, "hidden_dim": 16, "summary_token": 1, "teacher": "CLIP"},
        "sam": {"summary_dim": None, "feature_dim": 8, "hidden_dim": 16, "summary_token": 0, "teacher": "SAM"},
    }
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 8, "max_img_size": 32}
    torch.manual_seed(0)
    return RadioModel(RadioConfig.from_size("vit-ti-16", **tiny, num_cls_tokens=2, adaptors=adaptors)).eval()


def test_the_projection_is_that_of_the_teachers_class_token():
    model = open_clip.create_model("local-dir:" + CLIP).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inside = model.visual.forward_intermediates(images, indices=1, output_extra_tokens=True)
        class_token = inside["image_intermediates_prefix"][-1]  # (B, 1, width), as the last block leaves it
        projection = PatchProjection(CLIP)
        torch.testing.assert_close(projection(class_token)[:, 0], model.encode_image(images))
    assert sum(one.numel() for one in projection.parameters()) == 192 * 128 + 2 * 192  # nothing else is kept


def test_averaged_patches_project_to_the_summary(tmp_path, monkeypatch):
    tower = open_clip.transformer.VisionTransformer(
        **{"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0},
        **{"pool_type": "avg", "output_dim": 12},
    ).eval()
    nn.init.normal_(tower.ln_post.weight)
    teacher = type("Teacher", (), {"model": tower})()
    monkeypatch.setattr("transformers_radio.evaluation.segmentation.words.build_teacher", lambda *_: teacher)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        inside = tower.forward_intermediates(images, indices=1, output_fmt="NLC")
        patches = PatchProjection("averaging")(inside["image_intermediates"][-1])
        torch.testing.assert_close(patches.mean(dim=1), tower(images))
    tower.proj = None
    with pytest.raises(ValueError, match="averaging has no projection.*use summary_head_patches"):
        PatchProjection("averaging")


def test_both_ways_from_a_student_to_the_text_space(student):
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(1))
    projection = PatchProjection(CLIP)
    with torch.no_grad():
        output = student(images)
        patch = output.features[1, 5]  # row 2, column 1 of a grid of two columns
        head = student.adaptors["clip"].summary_head
        by_head = encode_grid(summary_head_patches(student, "clip"), images)
        torch.testing.assert_close(by_head[1, :, 2, 1], head(patch))
        # The same head on the class token gives the summary that zero-shot classification uses.
        token = output.last_hidden_state[1, 1]
        torch.testing.assert_close(output.adaptors["clip"].summary[1], head(token))
        projected = encode_grid(projected_patches(student, "clip", projection), images)
        torch.testing.assert_close(projected[1, :, 2, 1], projection(output.adaptors["clip"].features[1, 5]))
    assert by_head.shape == projected.shape == (2, 128, 4, 2)
    with pytest.raises(ValueError, match="'sam' is not an adaptor with a summary; the model has clip"):
        summary_head_patches(student, "sam")


def test_similarities_are_cosines():
    classifier = F.normalize(torch.randn(5, 6), dim=1)
    embeddings = torch.randn(2, 6, 3, 4)
    expected = F.cosine_similarity(embeddings[:, None], classifier[None, :, :, None, None], dim=2)
    torch.testing.assert_close(TextHead(classifier)(embeddings), expected)


def test_a_split_whose_colors_are_its_words(tmp_path):
    words = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=1)
    rng = np.random.default_rng(0)
    missed = pixels = 0
    for number in range(3):
        mask = rng.integers(0, 4, (4, 6)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)  # 0: background
        shown = np.where(rng.random((32, 48)) < 0.1, 1, mask)  # specks of red that patches outvote
        missed, pixels = missed + (mask == 0).sum(), pixels + (mask > 0).sum()
        image = np.vstack([[90, 90, 90], 255 * words])[shown].astype(np.uint8)
        for kind, content in (("images", image), ("masks", mask)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(content).save(tmp_path / kind / f"{number}.png")
    data = SegmentationData(
        name="words",
        path=str(tmp_path),
        classes=["red", "green", "blue"],
        reduce_labels=True,
        splits={"validation": [SplitSource(images="images", masks="masks")]},
    )
    config = SegmentationConfig(
        **{"short_side": 32, "long_side": 48, "crop_size": 32, "stride": 16, "size_divisor": 8, "num_workers": 0}
    )

    def encode(images):
        grid = F.avg_pool2d(images, 8)
        return grid.flatten(2).transpose(1, 2), tuple(grid.shape[-2:])

    config.test_mode = "whole"
    report = dense_zero_shot(encode, "colors", words, data, config, "mean color of patches")
    assert report["aAcc"] > 75 and (report["pixels_left_out"], report["pixels"]) == (missed, pixels)
    assert report["protocol"].startswith("dense zero-shot, mean color of patches; test: 32 pixels, whole image")
    swapped = dense_zero_shot(encode, "colors", words[[1, 2, 0]], data, config, "wrong words")
    assert swapped["aAcc"] < 25
    with pytest.raises(ValueError, match="classifier has 2 classes, words has 3"):
        dense_zero_shot(encode, "colors", words[:2], data, config, "too few")
    with pytest.raises(ValueError, match="Patches have 3 dimensions and the text 5"):
        dense_zero_shot(encode, "colors", torch.ones(3, 5), data, config, "another space")
