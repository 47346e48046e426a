"""Windows against mmsegmentation's rule written out; logits against a loop and an encoder that copies pixels."""

import pytest
import torch
import torch.nn.functional as F

from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.evaluation.segmentation.inference import encode_grid, image_logits, window_starts


def patch_encoder(size):
    """Mean colors of patches, times the brightest pixel of the input: what a window sees changes all its patches."""

    def encode(images):
        grid = F.avg_pool2d(images, size) * images.amax(dim=(1, 2, 3), keepdim=True)
        return grid.flatten(2).transpose(1, 2), tuple(grid.shape[-2:])

    return encode


def copy_pixels(images):
    return images.flatten(2).transpose(1, 2), tuple(images.shape[-2:])


def config(**changes):
    return SegmentationConfig(**{"crop_size": 16, "stride": 11, "size_divisor": 4, "batch_size": 3, **changes})


@pytest.mark.parametrize(("window", "stride"), [(512, 341), (16, 11), (16, 16), (16, 1)])
def test_windows_begin_where_mmsegmentation_has_them(window, stride):
    for length in (window, window + 1, window + stride, window + stride + 1, 3 * window + 5):
        expected = []
        for index in range(max(length - window + stride - 1, 0) // stride + 1):
            end = min(index * stride + window, length)
            expected.append(max(end - window, 0))
        assert window_starts(length, window, stride) == expected
        assert expected[-1] + window == length


def test_sliding_window_is_the_mean_of_overlapping_windows():
    image = torch.rand(3, 29, 40, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Conv2d(3, 5, 1)
    total, count = torch.zeros(5, 29, 40), torch.zeros(29, 40)
    for top in (0, 11, 13):
        for left in (0, 11, 22, 24):
            window = image[None, :, top : top + 16, left : left + 16]
            grid = F.avg_pool2d(window, 4) * window.max()
            logits = F.interpolate(head(grid), size=(16, 16), mode="bilinear", align_corners=False)[0]
            total[:, top : top + 16, left : left + 16] += logits.detach()
            count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(image_logits(patch_encoder(4), head, image, config()), total / count)


@pytest.mark.parametrize("size", [(16, 16), (29, 40), (9, 40), (5, 7)])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_every_pixel_of_any_image_comes_back_in_its_place(mode, size):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    logits = image_logits(copy_pixels, lambda features: features, image, config(test_mode=mode))
    torch.testing.assert_close(logits, image)


def test_whole_images_are_padded_or_resized_to_the_divisor():
    sizes = []

    def encode(images):
        sizes.append(tuple(images.shape[-2:]))
        return copy_pixels(images)

    ramp = torch.linspace(0, 1, 21).expand(3, 10, 21)
    for fit in ("pad", "resize"):
        logits = image_logits(encode, lambda features: features, ramp, config(test_mode="whole", whole_fit=fit))
        torch.testing.assert_close(logits, ramp, atol=0 if fit == "pad" else 0.03, rtol=0)
    assert sizes == [(12, 24), (8, 20)]


def test_features_come_as_row_major_maps_without_gradients():
    weight = torch.ones(1, requires_grad=True)
    images = torch.rand(2, 3, 8, 12)
    maps = encode_grid(lambda x: patch_encoder(4)(x * weight), images)
    assert maps.shape == (2, 3, 2, 3) and not maps.requires_grad
    torch.testing.assert_close(maps[1, :, 1, 2], images[1, :, 4:, 8:].mean(dim=(1, 2)) * images[1].max())
    halved = encode_grid(lambda x: copy_pixels(F.conv2d(x, torch.eye(3)[:, :, None, None])), images, "bf16")
    assert halved.dtype == torch.float32 and torch.equal(halved, images.bfloat16().float())


def test_bad_features_are_named():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"features \(2, 5, 3\) and the grid \(2, 2\).*without class tokens"):
        encode_grid(lambda x: (torch.zeros(2, 5, 3), (2, 2)), images)
    with pytest.raises(ValueError, match="NaN"):
        encode_grid(lambda x: (torch.full((2, 4, 3), torch.nan), (2, 2)), images)
