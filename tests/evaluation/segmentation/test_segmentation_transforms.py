"""Geometry on images that show their own label map; colors against colorsys; draws by a scripted generator."""

import colorsys

import numpy as np
import pytest
import torch

from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.evaluation.segmentation.transforms import (
    distort_colors,
    fitted_size,
    resize_bilinear,
    resize_mask,
    training_sample,
)


class Scripted:
    """Stands in for a generator: hands out given numbers and counts the positions that were drawn."""

    def __init__(self, randoms=(), uniforms=()):
        self.randoms, self.uniforms, self.positions = list(randoms), list(uniforms), 0

    def random(self):
        return self.randoms.pop(0)

    def uniform(self, low, high):
        value = self.uniforms.pop(0)
        assert low <= value <= high
        return value

    def integers(self, low, high):
        self.positions += 1
        return low


def config(**changes):
    """Neither scaling nor colors for images of 24 pixels a side."""
    plain = {"crop_size": 16, "stride": 8, "size_divisor": 8, "short_side": 24, "scale_min": 1, "scale_max": 1}
    return SegmentationConfig(**{**plain, "photometric_distortion": False, **changes})


def shown(mask):
    """An image whose channels say the class: 0, 80 or 160."""
    return (mask * 80).byte().expand(3, -1, -1)


def test_sizes_keep_the_shape_within_both_limits():
    assert fitted_size(1024, 1366, 2048, 512) == (512, 683)
    assert fitted_size(300, 3000, 2048, 512) == (205, 2048)  # the long side decides
    assert fitted_size(100, 50, 2048, 512) == (1024, 512)


def test_crop_and_flip_move_image_and_labels_together():
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (24, 40)))
    seen = set()
    for seed in range(30):
        image, labels = training_sample(shown(mask), mask, config(), np.random.default_rng(seed))
        assert image.shape == (3, 16, 16) and torch.equal(image, shown(labels))
        windows = mask.unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 1)  # (positions, 16, 16)
        straight, mirrored = (windows == labels).flatten(1).all(1), (windows == labels.flip(1)).flatten(1).all(1)
        assert straight.any() != mirrored.any()
        seen.add((bool(mirrored.any()), int((straight | mirrored).nonzero()[0])))
    assert len(seen) > 20 and {flipped for flipped, _ in seen} == {True, False}


def test_scale_moves_image_and_labels_together():
    mask = torch.zeros(24, 24, dtype=torch.long)
    mask[8:] = 1
    for scale in (0.5, 2.0):
        setting = config(scale_min=scale, scale_max=scale, crop_size=48, flip_probability=0)
        image, labels = training_sample(shown(mask), mask, setting, np.random.default_rng(0))
        side = int(24 * scale)
        assert (labels[:side, :side] == 0).sum() == side * side / 3 and (labels[:side, :side] == 1).sum() > 0
        assert ((image[0].float() / 80).round()[:side, :side] == labels[:side, :side]).all()
        # The rest of a crop that is larger than the image is black and does not count.
        assert (labels[side:] == 255).all() and (labels[:, side:] == 255).all() and image[:, side:].sum() == 0


def test_masks_are_resized_to_existing_classes_and_images_without_antialiasing():
    mask = torch.tensor([[0, 149], [255, 300]])
    assert resize_mask(mask, (4, 6)).unique().tolist() == [0, 149, 255, 300]
    image = torch.tensor([[0, 100, 200, 40]], dtype=torch.uint8).expand(3, 4, 4)
    assert resize_bilinear(image, (2, 2))[0].tolist() == [[50, 120]] * 2  # means of the two nearest pixels alone


def test_crops_of_mostly_one_class_are_drawn_again():
    mask = torch.zeros(24, 28, dtype=torch.long)
    mask[:, 14:] = 1

    def largest_shares(limit):
        setting = config(max_class_share=limit)
        crops = [training_sample(shown(mask), mask, setting, np.random.default_rng(seed))[1] for seed in range(40)]
        return [float(crop.flatten().bincount().max() / crop.numel()) for crop in crops]

    assert max(largest_shares(0.75)) < 0.75 < sorted(largest_shares(1.0))[-10]


@pytest.mark.parametrize(
    ("pixels", "draws"),
    [
        ([1], 11),  # one class alone, however often: the eleventh crop is taken
        ([0, 1], 1),
        ([255] * 14 + [0, 1], 1),  # pixels that do not count are no class
        ([0] * 7 + [1], 11),
    ],
)
def test_the_number_of_draws(pixels, draws):
    mask = torch.tensor(pixels * (256 // len(pixels))).view(16, 16)
    generator = Scripted(randoms=[0.9], uniforms=[1])
    training_sample(shown(mask), mask, config(short_side=16), generator)
    assert generator.positions == 2 * draws  # top and left


def test_each_color_change_by_itself():
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)

    def color(randoms, uniforms):
        changed = distort_colors(image, Scripted(randoms, uniforms))
        assert changed.dtype == torch.uint8 and (changed == changed[:, :1, :1]).all()
        return changed[:, 0, 0].tolist()

    # brightness, contrast first, contrast, saturation, hue
    assert color([0.9, 0.9, 0.9, 0.9, 0.9], []) == [200, 100, 50]
    assert color([0.1, 0.9, 0.9, 0.9, 0.9], [-32]) == [168, 68, 18]
    assert color([0.9, 0.1, 0.1, 0.9, 0.9], [1.5]) == [255, 150, 75]
    gray = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    expected = [(value + gray) / 2 for value in (200, 100, 50)]
    assert color([0.9, 0.9, 0.9, 0.1, 0.9], [0.5]) == pytest.approx(expected, abs=1)
    hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 100 / 255, 50 / 255)
    expected = [255 * part for part in colorsys.hsv_to_rgb(hue + 18 / 360, saturation, value)]
    assert color([0.9, 0.9, 0.9, 0.9, 0.1], [18]) == pytest.approx(expected, abs=2)
    # Contrast before a saturation of 1/2 clips first; after it, less or nothing is clipped.
    first, last = ([0.9, order, 0.1, 0.1, 0.9] for order in (0.1, 0.9))
    assert color(first, [1.5, 0.5])[0] < color(last, [1.5, 0.5])[0]
