"""The cropped position embedding (CPE): sampling in training, the rule at inference, the cached table."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.tiny_radio import build
from transformers_radio import RadioModel


def bilinear(table, y, x):
    """Value of a (side, side, D) table at continuous position (y, x), corners at 0 and side - 1."""
    y0, x0 = min(int(y), table.shape[0] - 2), min(int(x), table.shape[1] - 2)
    dy, dx = y - y0, x - x0
    top = table[y0, x0] * (1 - dx) + table[y0, x0 + 1] * dx
    bottom = table[y0 + 1, x0] * (1 - dx) + table[y0 + 1, x0 + 1] * dx
    return top * (1 - dy) + bottom * dy


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 3), (12, 12)])
def test_training_positions_follow_the_formula_image_by_image(rows, cols):
    model = build(max_img_size=128).train()
    side, batch = 8, 4
    torch.manual_seed(3)
    positions = model.embeddings.positions(batch, rows, cols, torch.float32)
    torch.manual_seed(3)
    draws = torch.rand(4, batch, 1)[..., 0].double().numpy()
    table = model.embeddings.position_embedding.detach().double().view(side, side, -1).numpy()
    for image in range(batch):
        s = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * draws[0, image]
        a = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[1, image])
        sx, sy = min(max(s * a, 0), 1), min(max(s / a, 0), 1)
        ox, oy = (1 - sx) * draws[2, image], (1 - sy) * draws[3, image]
        expected = [
            bilinear(
                table, (oy + sy * i / max(rows - 1, 1)) * (side - 1), (ox + sx * j / max(cols - 1, 1)) * (side - 1)
            )
            for i in range(rows)
            for j in range(cols)
        ]
        np.testing.assert_allclose(positions[image].detach().numpy(), np.stack(expected), atol=1e-5)


def test_training_crops_have_the_published_distribution():
    from transformers_radio.modeling.training_radio import cpe_training_grid

    torch.manual_seed(0)
    grid = (cpe_training_grid(20000, 3, 4, [0.1, 1.0]) + 1) / 2
    assert grid.shape == (20000, 3, 4, 2) and grid.min() >= 0 and grid.max() <= 1 + 1e-6
    left, right = grid[:, 0, 0, 0], grid[:, 0, -1, 0]
    top, bottom = grid[:, 0, 0, 1], grid[:, -1, 0, 1]
    width, height = right - left, bottom - top
    free = (width < 0.999) & (height < 0.999)  # nothing was clamped, so the draws can be read back
    side, aspect = (width * height).sqrt()[free], (width / height).sqrt()[free]
    assert side.min() >= math.sqrt(0.1) - 1e-5 and width.max() <= 1 and height.max() <= 1
    assert 3 / 4 - 1e-4 <= aspect.min() < 0.76 and 1.32 < aspect.max() <= 4 / 3 + 1e-4
    # uniform side: the share below the middle of the range where no aspect ratio clamps
    inner = side[side < 0.75]
    assert ((inner < (math.sqrt(0.1) + 0.75) / 2).float().mean() - 0.5).abs() < 0.02
    log_aspect = aspect[side < 0.75].log() / math.log(4 / 3)
    assert log_aspect.mean().abs() < 0.02 and (log_aspect.var() - 1 / 3).abs() < 0.02  # uniform on [-1, 1]
    # uniform offset in what the crop leaves free
    share = (left / (1 - width))[free]
    assert (share.mean() - 0.5).abs() < 0.02 and (share.var() - 1 / 12).abs() < 0.01


def test_scale_range_is_honored():
    from transformers_radio.modeling.training_radio import cpe_training_grid

    grid = cpe_training_grid(500, 2, 2, [1.0, 1.0])
    assert torch.maximum(grid[:, 0, 1, 0] - grid[:, 0, 0, 0], grid[:, 1, 0, 1] - grid[:, 0, 0, 1]).min() > 1.999


def test_inference_takes_the_top_left_of_a_square_resize():
    model = build()
    table = model.embeddings.position_embedding.detach().view(1, 32, 32, 32).permute(0, 3, 1, 2)
    square = F.interpolate(table, size=(9, 9), mode="bilinear", align_corners=False, antialias=False)
    with torch.no_grad():
        positions = model.embeddings.positions(1, 9, 4, torch.float32)
    assert torch.equal(positions.view(9, 4, 32), square[0].permute(1, 2, 0)[:, :4])


def test_table_is_used_unmodified_on_its_own_grid():
    model = build(max_img_size=128)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model.embeddings.positions(1, 8, 8, torch.float32), model.embeddings.position_embedding)


def test_position_dropout_leaves_whole_images_without_positions():
    model = build(pos_dropout=0.25).train()
    torch.manual_seed(0)
    positions = model.embeddings.positions(2000, 2, 2, torch.float32)
    dropped = (positions == 0).flatten(1)
    assert (dropped.all(1) == dropped.any(1)).all()
    assert dropped.all(1).float().mean() == pytest.approx(0.25, abs=0.03)
    model.eval()
    assert (model.embeddings.positions(1, 2, 2, torch.float32) != 0).all()


def test_sampling_can_be_switched_off_and_belongs_to_training():
    images = torch.rand(2, 3, 64, 64)
    model = build(cpe_sampling=False).train()
    assert torch.equal(model(images).features, model(images).features)
    model = build().train()
    assert not torch.equal(model(images).features, model(images).features)
    model.eval()
    assert torch.equal(model(images).features, model(images).features)


@torch.no_grad()
def test_cached_positions_notice_every_change_of_the_weights():
    model = build()
    images = torch.rand(1, 3, 64, 96)

    def check():
        fresh = RadioModel(model.config).eval().to(model.dtype)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(images).features, fresh(images).features)
        assert torch.equal(model(images).features, fresh(images).features)

    table = model.embeddings.position_embedding
    before = model(images).features
    check()
    assert model.embeddings.positions(1, 4, 6, torch.float32) is model.embeddings.positions(1, 4, 6, torch.float32)
    table.mul_(2)
    assert not torch.equal(model(images).features, before)
    check()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(images).features.square().sum().backward()
    optimizer.step()
    check()
    model.load_state_dict(build().state_dict())
    assert torch.equal(model(images).features, before)
    model.to(torch.bfloat16)
    check()
    model.float()
    check()
    table.data = torch.randn_like(table)
    check()
    table.data.mul_(3)
    model.eval()
    check()
    table.requires_grad_(False)
    with torch.inference_mode():
        check()
    check()


@torch.no_grad()
def test_positions_are_new_where_a_new_table_lies_at_the_old_address():
    embeddings = build().embeddings
    for _ in range(50):  # the allocator likes to hand out the address that was freed last
        embeddings.position_embedding.normal_()
        embeddings.positions(1, 4, 6, torch.float32)
        embeddings.bfloat16()
        embeddings.float()
        assert torch.equal(embeddings.positions(1, 4, 6, torch.float32), embeddings._resize_positions(4, 6))
        embeddings.position_embedding.data = torch.zeros(1)
        embeddings.position_embedding.data = torch.randn(1, embeddings.table_side**2, embeddings.config.hidden_size)
        assert torch.equal(embeddings.positions(1, 4, 6, torch.float32), embeddings._resize_positions(4, 6))


def test_gradients_reach_the_table_in_eval_mode_too():
    model = build()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model(images)  # fills the cache
    for _ in range(2):
        model.zero_grad()
        model(images).features.square().sum().backward()
        assert model.embeddings.position_embedding.grad.abs().sum() > 0
