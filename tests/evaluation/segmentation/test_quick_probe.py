"""The light probe against scikit-learn and against chance."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from transformers_radio.evaluation.segmentation.miou import confusion_matrix, iou_scores
from transformers_radio.evaluation.segmentation.quick_probe import _bilinear_weights, probe_miou

torch.set_num_threads(1)


def pictures(count, seed, block=1, side=32):
    """Quarters in one of four colors, the class, with noise in blocks of pixels; the last row does not count."""
    rng = np.random.default_rng(seed)
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 70]])
    mask = rng.integers(0, 4, (count, 2, 2)).repeat(side // 2, axis=1).repeat(side // 2, axis=2)
    noise = rng.normal(0, 60, (count, side // block, side // block, 3)).repeat(block, axis=1).repeat(block, axis=2)
    image = colors[mask] + noise
    images = torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    mask[:, -1] = 255
    return images, torch.from_numpy(mask.astype(np.uint8))


def patches(images, size):
    """The colors of an image's patches as its features: uint8 (N, 3, H, W) -> (N, 3, H / size, W / size)."""
    return F.avg_pool2d(images.float() / 255, size)


TRAIN, VALIDATION = pictures(200, 0), pictures(60, 1)


def probe(size, train=TRAIN, validation=VALIDATION, **options):
    maps = patches(train[0], size), patches(validation[0], size)
    return probe_miou((maps[0], train[1]), (maps[1], validation[1]), num_classes=4, **options)


def test_weights_are_those_of_the_bilinear_resize():
    maps = torch.randn(2, 5, 3, 4)
    expected = F.interpolate(maps, size=(17, 10), mode="bilinear", align_corners=False)
    weights = _bilinear_weights(maps.shape[-2:], expected.shape[-2:])
    torch.testing.assert_close(maps.flatten(2) @ weights, expected.flatten(2))
    assert int((weights > 0).sum(dim=0).max()) <= 4


@pytest.mark.parametrize("size", [1, 4, 8])
def test_it_scores_as_scikit_learns_logistic_regression(size):
    """On the same features resized to the masks, pixel by pixel; grids of 32, 8 and 4 patches a side."""

    def pixels(images):
        maps = F.interpolate(patches(images, size), size=(32, 32), mode="bilinear")
        return maps.permute(0, 2, 3, 1)  # (N, 3, 32, 32) -> (N, 32, 32, 3)

    train, validation = pictures(200, 0, size), pictures(60, 1, size)
    counted = train[1] != 255
    chosen = np.random.default_rng(0).choice(int(counted.sum()), 20000, replace=False)
    expert = LogisticRegression(C=1e4).fit(pixels(train[0])[counted][chosen], train[1][counted][chosen])
    guess = torch.from_numpy(expert.predict(pixels(validation[0]).flatten(0, 2))).view(validation[1].shape)
    expected = iou_scores(confusion_matrix(guess.long(), validation[1].long(), 4))["mIoU"]
    score = probe(size, train, validation)
    assert score == pytest.approx(expected, abs=2.5)
    assert 50 < score < 95  # neither chance nor perfect: the comparison says something


def test_features_without_information_are_at_chance():
    blind = [torch.randn(len(images), 8, 4, 4) for images, _ in (TRAIN, VALIDATION)]
    assert probe_miou((blind[0], TRAIN[1]), (blind[1], VALIDATION[1]), num_classes=4, steps=100) < 22


def test_a_seed_fixes_the_score_and_the_callers_random_numbers_stay():
    torch.manual_seed(3)
    first = probe(8, steps=20)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert probe(8, steps=20) == first
    assert probe(8, steps=20, seed=1) != first


def test_masks_may_be_larger_than_the_images():
    larger = [
        (part[0], F.interpolate(part[1][None].float(), size=(64, 64), mode="nearest")[0].byte())
        for part in (TRAIN, VALIDATION)
    ]
    assert probe(4, *larger) == pytest.approx(probe(4), abs=3)


def test_bad_input_is_named():
    images, masks = VALIDATION
    maps = patches(images, 8)
    with pytest.raises(ValueError, match="train features are torch.uint8.*expected floating point"):
        probe_miou((images, masks), (maps, masks), 4)
    with pytest.raises(ValueError, match=r"validation masks are \(59, 32, 32\); expected \(60, H, W\)"):
        probe_miou((maps, masks), (maps, masks[1:]), 4)
    wrong = masks.clone()
    wrong[7, 3, 3] = 4
    with pytest.raises(ValueError, match="train mask 7 has the id 4; expected 0 to 3 or 255"):
        probe_miou((maps, wrong), (maps, masks), 4)
