import functools

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from helpers.tiny_sam import NECK, PATCH, SIDE, WIDTH
from transformers_radio.teachers.segment_anything import load_sam


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory):
    """A tiny SAM of segment_anything's own classes, in its file format."""
    torch.manual_seed(0)
    sam = Sam(
        ImageEncoderViT(
            depth=2,
            embed_dim=WIDTH,
            img_size=SIDE,
            num_heads=4,
            patch_size=PATCH,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=3,
            out_chans=NECK,
        ),
        PromptEncoder(NECK, (SIDE // PATCH, SIDE // PATCH), (SIDE, SIDE), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=NECK,
            transformer=TwoWayTransformer(depth=2, embedding_dim=NECK, num_heads=8, mlp_dim=40),
            iou_head_hidden_dim=24,
        ),
    )
    with torch.no_grad():  # fresh weights hardly look at the image; larger ones draw different masks for each box
        for parameter in sam.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def sam(sam_file):
    return load_sam(str(sam_file))
