"""What a model is called with: wrong input is a ValueError in one line that names it, its value and the fix."""

import pytest
import torch

from helpers.tiny_radio import TINY, build
from transformers_radio import (
    RadioBackbone,
    RadioBackboneConfig,
    RadioConfig,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioVisionTower,
    RadioVisionTowerConfig,
)

ADAPTORS = {"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16}}
IMAGES = torch.rand(2, 3, 32, 48)
PACKED = torch.rand(10, 768)
GRIDS = torch.tensor([[2, 2], [2, 3]])
MASK = torch.ones(2, 32, 48)
CLASSES = torch.tensor([1, 2])
MAPS = torch.ones(2, 4, 4, dtype=torch.long)
NAN = float("nan")


@pytest.fixture(scope="module")
def models():
    config = RadioConfig(**TINY, num_labels=4)
    torch.manual_seed(0)
    return {
        "model": build(adaptors=ADAPTORS),
        "classifier": RadioForImageClassification(config).eval(),
        "regressor": RadioForImageClassification(RadioConfig(**TINY, num_labels=1)).eval(),
        "segmenter": RadioForSemanticSegmentation(config).eval(),
        "backbone": RadioBackbone(RadioBackboneConfig(**TINY, out_indices=[1, 3])).eval(),
        "tower": RadioVisionTower(RadioVisionTowerConfig(radio_config=config)).eval(),
    }


FAMILY = ("model", "classifier", "segmenter", "backbone", "tower")


def assert_refused(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


IMAGES_THAT_ARE_NONE = {
    "meta": (IMAGES.to("meta"), "meta device"),
    "sparse": (IMAGES.to_sparse(), "torch.sparse_coo tensor, expected a dense one"),
    "nested": (torch.nested.nested_tensor([IMAGES[0], IMAGES[1, :, :16]]), "nested tensor, expected a dense one"),
    "fp8": (IMAGES.to(torch.float8_e4m3fn), "float8_e4m3fn, expected float32"),
    "complex": (IMAGES.to(torch.complex64), "complex64, expected float32"),
    "bool": (IMAGES.bool(), "torch.bool, expected float32"),
    "uint8": (IMAGES.to(torch.uint8), "divide by 255"),
    "3-d": (IMAGES[0], "(3, 32, 48)"),
    "0-d": (torch.tensor(0.5), "shape ()"),
    "four channels": (torch.rand(1, 4, 32, 32), "(1, 4, 32, 32)"),
    "below a patch": (IMAGES[..., :8, :8], "8x8"),
    "no column": (IMAGES[..., :0], "32x0"),
    "no image": (IMAGES[:0], "no image"),
    "list": ([1], "pixel_values is a list"),
    "None": (None, "pixel_values is a NoneType"),
}


@pytest.mark.parametrize("kind", IMAGES_THAT_ARE_NONE)
@pytest.mark.parametrize("name", FAMILY)
def test_images(models, name, kind):
    images, words = IMAGES_THAT_ARE_NONE[kind]
    assert_refused(lambda: models[name](images), words)
    options = {"classifier": {"labels": CLASSES}, "segmenter": {"labels": MAPS}}
    options |= {"tower": {"image_sizes": [[32, 32], [16, 16]]}}
    assert_refused(lambda: models[name](images, **options.get(name, {})), words)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("model", {"adaptors": 3}, "adaptors is 3, expected a list out of ['clip']"),
        ("model", {"adaptors": ["x"]}, "adaptors is ['x']"),
        ("model", {"adaptors": [3]}, "adaptors is [3]"),
        ("model", {"adaptors": "clip"}, "adaptors is 'clip'"),
        ("model", {"window_size": True}, "window_size is True"),
        ("model", {"window_size": -1}, "window_size is -1"),
        ("model", {"window_size": NAN}, "window_size is nan"),
        ("model", {"pixel_mask": torch.tensor(1.0)}, "pixel_mask has shape ()"),
        ("model", {"pixel_mask": MASK.to(torch.complex64)}, "complex64"),
        ("model", {"pixel_mask": MASK.to("meta")}, "pixel_mask is on the meta device"),
        ("model", {"pixel_mask": MASK.to_sparse()}, "pixel_mask is a torch.sparse_coo tensor"),
        ("model", {"pixel_mask": MASK * NAN}, "pixel_mask of image 0 is not a rectangle"),
        ("model", {"pixel_mask": -MASK}, "pixel_mask of image 0 is not a rectangle"),
        ("model", {"pixel_mask": [1]}, "pixel_mask is a list"),
        ("classifier", {"labels": torch.tensor(1)}, "got 1 labels for 2 images"),
        ("classifier", {"labels": [1, 2]}, "labels is a list"),
        ("classifier", {"labels": torch.tensor([1, 2, 3])}, "got 3 labels for 2 images"),
        ("classifier", {"labels": CLASSES.to("meta")}, "labels are on the meta device"),
        ("classifier", {"labels": CLASSES.to(torch.complex64)}, "complex64"),
        ("classifier", {"labels": torch.rand(2, 3)}, "labels have shape (2, 3)"),
        ("classifier", {"labels": torch.rand(2)}, "labels have shape (2,)"),
        ("classifier", {"labels": torch.ones(2, 4).bool()}, "torch.bool; expected float targets (2, 4)"),
        ("regressor", {"labels": torch.rand(2, 3)}, "labels have shape (2, 3)"),
        ("segmenter", {"labels": torch.tensor(1)}, "labels have shape ()"),
        ("segmenter", {"labels": [[1]]}, "labels is a list"),
        ("segmenter", {"labels": MAPS[:1]}, "labels have shape (1, 4, 4)"),
        ("segmenter", {"labels": MAPS[:, :0]}, "labels have shape (2, 0, 4)"),
        ("segmenter", {"labels": MAPS.float()}, "torch.float32"),
        ("segmenter", {"labels": MAPS.to("meta")}, "labels are on the meta device"),
        ("backbone", {"output_hidden_states": 100}, "output_hidden_states is 100"),
        ("tower", {"output_hidden_states": [0, 99]}, "output_hidden_states is [0, 99]"),
        ("tower", {"output_hidden_states": [1.5]}, "output_hidden_states is [1.5]"),
        ("tower", {"image_sizes": 3}, "image_sizes are 3"),
        ("tower", {"image_sizes": "a"}, "image_sizes are 'a'"),
        ("tower", {"image_sizes": [[-16, 16], [16, 16]]}, "image_sizes are [[-16, 16]"),
        ("tower", {"image_sizes": [[0, 16], [16, 16]]}, "image_sizes are [[0, 16]"),
        ("tower", {"image_sizes": [[64, 16], [16, 16]]}, "image_sizes are [[64, 16]"),
        ("tower", {"image_sizes": GRIDS.to("meta")}, "image_sizes are a tensor (2, 2)"),
        *((name, {"output_hidden_states": "yes"}, "output_hidden_states is 'yes'") for name in FAMILY),
        *((name, {"output_attentions": "yes"}, "output_attentions is 'yes'") for name in FAMILY),
    ],
)
def test_options(models, name, options, words):
    assert_refused(lambda: models[name](IMAGES, **options), words)


@pytest.mark.parametrize(
    ("patches", "grids", "words"),
    [
        (PACKED, torch.tensor(3), "shape ()"),
        (PACKED, GRIDS.to(torch.complex64), "complex64"),
        (PACKED, GRIDS.to("meta"), "image_grid_hw is on the meta device"),
        (PACKED, GRIDS.bool(), "torch.bool"),
        (PACKED, GRIDS * NAN, "float32"),
        (PACKED, torch.tensor([[-2, -2], [2, 3]]), "grids [(-2, -2), (2, 3)]"),
        (PACKED, torch.tensor([[0, 2], [2, 5]]), "grids [(0, 2), (2, 5)]"),
        (PACKED, GRIDS.to_sparse(), "sparse"),
        (PACKED.to("meta"), GRIDS, "meta device"),
        (PACKED.int(), GRIDS, "int32"),
        (IMAGES, GRIDS, "(2, 3, 32, 48)"),
    ],
)
def test_packed_patches(models, patches, grids, words):
    assert_refused(lambda: models["model"](patches, image_grid_hw=grids), words)


@pytest.mark.parametrize(("height", "width"), [(0, 16), (-16, -16), ("a", 1), (16.0, 16), (True, 16), (None, 1)])
def test_sizes(models, height, width):
    model = models["model"]
    for call in (
        lambda: model.get_nearest_supported_resolution(height, width),
        lambda: model.features_to_grid(torch.rand(1, 1, 32), height, width),
        lambda: model.sample_window_size(height, width),
    ):
        assert_refused(call, f"height and width are {height!r} and {width!r}")


def test_what_is_right_stays_right(models):
    """Labels of other integer types and masks of other types mean the same; chosen hidden states are those of all."""
    classifier, segmenter = models["classifier"], models["segmenter"]
    expected = classifier(IMAGES, labels=CLASSES).loss
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(classifier(IMAGES, labels=CLASSES.to(dtype)).loss, expected)
    expected = segmenter(IMAGES, labels=MAPS).loss
    assert torch.equal(segmenter(IMAGES, labels=MAPS.bool()).loss, expected)
    mask = torch.ones(2, 32, 48)
    mask[1, :, 32:] = 0
    expected = models["model"](IMAGES, pixel_mask=mask).features
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.bfloat16):
        assert torch.equal(models["model"](IMAGES, pixel_mask=mask.to(dtype)).features, expected)
    for name in ("backbone", "tower"):
        every = models[name](IMAGES, output_hidden_states=True).hidden_states
        chosen = models[name](IMAGES, output_hidden_states=[0, -1]).hidden_states
        assert len(chosen) == len(every) == 4
        for index, (one, other) in enumerate(zip(every, chosen, strict=True)):
            assert torch.equal(one, other) if index in (0, 3) else other is None
