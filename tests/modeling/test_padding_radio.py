"""Padded batches with a pixel mask against each image alone, through transformers' own RADIO where it can."""

import pytest
import torch

from helpers.tiny_radio import build, native
from transformers_radio import RadioBackbone, RadioForImageClassification, RadioImageProcessor

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "fine": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 16, "upsample_factor": 2},
    "words": {"summary_dim": 8, "feature_dim": None, "hidden_dim": 16},
    "attn": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 16, "spatial_mlp_version": "attn"},
}
SIZES = [(50, 96), (96, 40), (90, 90)]  # (height, width) in pixels


def padded(step=16):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in SIZES]
    processor = RadioImageProcessor(size={"longest_edge": 96}, size_divisor=step)
    return images, processor, processor(images, return_tensors="pt")


def test_an_image_has_the_native_features_in_any_batch():
    model = build(adaptors=ADAPTORS)
    _, _, batch = padded()
    assert batch.pixel_values.shape == (3, 3, 96, 96)
    output = model(**batch, output_hidden_states=True)
    assert output.features.shape == (3, 36, 32) and output.last_hidden_state.shape == (3, 41, 32)
    twin = native(model)
    for index, (rows, cols) in enumerate([(4, 6), (6, 3), (6, 6)]):
        pixel_values = batch.pixel_values[index : index + 1, :, : 16 * rows, : 16 * cols]
        expected = twin(pixel_values, output_hidden_states=True)
        torch.testing.assert_close(output.summary[index], expected.summary[0], atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(mine[index, :5], theirs[0, :5], atol=1e-5, rtol=1e-5)
            grid = mine[index, 5:].unflatten(0, (6, 6))
            torch.testing.assert_close(grid[:rows, :cols].flatten(0, 1), theirs[0, 5:], atol=1e-5, rtol=1e-5)
            assert not grid[rows:].any() and not grid[:, cols:].any()
        heads = model(pixel_values).adaptors
        for name, alone in heads.items():
            mine = output.adaptors[name]
            if alone.summary is not None:
                torch.testing.assert_close(mine.summary[index], alone.summary[0], atol=1e-5, rtol=1e-5)
            if alone.features is None:
                assert mine.features is None
                continue
            factor = 2 if name == "fine" else 1
            grid = mine.features[index].unflatten(0, (6 * factor, 6 * factor))[: rows * factor, : cols * factor]
            torch.testing.assert_close(grid.flatten(0, 1), alone.features[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"window_size": 2}, {"summary_type": "mean", "num_cls_tokens": 0, "summary_idxs": []}]
)
def test_windows_and_average_pooling(fields):
    model = build(**fields)
    images, processor, batch = padded(model.min_resolution_step)
    output = model(**batch)
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        expected = model(alone.pixel_values)
        torch.testing.assert_close(output.summary[index], expected.summary[0], atol=1e-5, rtol=1e-5)
        grid = model.features_to_grid(expected.features, *alone.pixel_values.shape[-2:])[0]
        mine = model.features_to_grid(output.features, *batch.pixel_values.shape[-2:])[index]
        torch.testing.assert_close(mine[:, : grid.shape[1], : grid.shape[2]], grid, atol=1e-5, rtol=1e-5)


def test_gradients_flow_and_a_full_mask_changes_nothing():
    model = build()
    _, _, batch = padded()
    full = torch.ones_like(batch.pixel_mask)
    assert torch.equal(model(batch.pixel_values, pixel_mask=full).features, model(batch.pixel_values).features)
    model.train()
    output = model(**batch, adaptors=[])
    (output.features.sum() + output.summary.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_heads_and_backbones_take_the_mask():
    model = build()
    images, processor, batch = padded()
    torch.manual_seed(0)
    classifier = RadioForImageClassification(model.config).eval()
    backbone = RadioBackbone(model.config, out_indices=[1, 3]).eval()
    logits, maps = classifier(**batch).logits, backbone(**batch).feature_maps
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        torch.testing.assert_close(logits[index], classifier(**alone).logits[0], atol=1e-5, rtol=1e-5)
        for together, expected in zip(maps, backbone(alone.pixel_values).feature_maps, strict=True):
            mine = together[index, :, : expected.shape[2], : expected.shape[3]]
            torch.testing.assert_close(mine, expected[0], atol=1e-5, rtol=1e-5)


def test_wrong_masks_are_named():
    model = build()
    pixel_values = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"pixel_mask has shape \(2, 2, 2\) .*expected ones and zeros \(2, 32, 32\)"):
        model(pixel_values, pixel_mask=torch.ones(2, 2, 2))
    mask = torch.ones(2, 32, 32)
    mask[1, 4, 4] = 0
    for wrong in (mask, mask.flip(1), torch.cat([mask[:1], torch.zeros(1, 32, 32)])):
        with pytest.raises(ValueError, match="image 1 is not a rectangle at the top left"):
            model(pixel_values, pixel_mask=wrong)
    mask = torch.ones(2, 32, 32)
    mask[0, 16:] = 0
    with pytest.raises(ValueError, match="leave pixel_mask out"):
        model(torch.rand(4, 768), image_grid_hw=torch.tensor([[2, 2]]), pixel_mask=mask)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions"):
        model(pixel_values, pixel_mask=mask, output_attentions=True)
