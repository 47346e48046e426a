"""A small SAM of segment_anything's own classes."""

import functools

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn


def tiny_sam(window_size=3, global_blocks=(1, 3), grid=8, heads=4):
    """SAM's own classes, put together as `build_sam` does, small and with no two dimensions alike."""
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
