"""SAM teachers against segment_anything's own encoder, from its own .pth files."""

import functools

import pytest
import segment_anything
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F

from transformers_radio.teachers import build_teacher, load_sam


def tiny_sam(window_size=3, global_blocks=(1, 3), grid=8, heads=4):
    """SAM's own classes, put together as `build_sam` does, at a fraction of the size and with every dimension its own."""
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=4,
            embed_dim=48,
            img_size=grid * 8,
            mlp_ratio=3,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            num_heads=heads,
            patch_size=8,
            use_rel_pos=True,
            global_attn_indexes=global_blocks,
            window_size=window_size,
            out_chans=32,
        ),
        prompt_encoder=PromptEncoder(32, (grid, grid), (grid * 8, grid * 8), mask_in_chans=12),
        mask_decoder=MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=3, embedding_dim=32, num_heads=8, mlp_dim=40),
            num_multimask_outputs=2,
            iou_head_depth=4,
            iou_head_hidden_dim=20,
        ),
    )


@pytest.fixture
def make_file(tmp_path, randomize):
    def make(**kwargs):
        original = randomize(tiny_sam(**kwargs))
        torch.save(original.state_dict(), tmp_path / "sam.pth")
        return str(tmp_path / "sam.pth"), original

    return make


def encoder_outputs(sam, batch):
    """(before the neck, after it), each (B, h*w, C): SAM's own preprocessing in 0..255, and a hook on its last block."""
    caught = []
    handle = sam.image_encoder.blocks[-1].register_forward_hook(lambda *a: caught.append(a[2]))
    neck = sam.image_encoder(torch.stack([sam.preprocess(image * 255) for image in batch]))
    handle.remove()
    return caught[0].flatten(1, 2), neck.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "shape",
    [{}, {"window_size": 5, "global_blocks": (0, 2), "heads": 6}, {"window_size": 14}, {"window_size": 8, "heads": 3}],
    ids=["windows pad", "other blocks", "window above grid", "window equals grid"],
)
@torch.no_grad()
def test_trunk_and_neck(make_file, images, assert_contract, shape):
    path, original = make_file(**shape)
    trunk, neck = encoder_outputs(original, images(64))
    for features, expected, dim in (("trunk", trunk, 48), ("neck", neck, 32)):
        teacher = build_teacher("segment_anything", path, features=features)
        assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (None, dim, 64, 8)
        with torch.enable_grad():
            output = assert_contract(teacher)
        assert output.grid == (8, 8)
        torch.testing.assert_close(output.features, expected)
