"""A tiny SAM, a tiny student with an adaptor to it, pictures and boxes, and segment_anything's own predictor."""

import functools

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from transformers_radio.modeling import RadioConfig, RadioModel

SIDE, PATCH, WIDTH, NECK = 64, 8, 48, 32
SIZES = [(40, 56), (150, 90), (64, 64), (33, 64)]  # (H, W): smaller than SAM's input, larger, equal, and padded only


def write_sam(path):
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
    torch.save(sam.state_dict(), path)
    return path


def make_student(feature_dim=WIDTH, **adaptor):
    torch.manual_seed(1)
    entry = {"summary_dim": None, "feature_dim": feature_dim, "hidden_dim": 24, "teacher": "tiny sam", **adaptor}
    config = RadioConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=PATCH,
        max_img_size=SIDE,
        num_registers=1,
        window_num_global=2,
        adaptors={"sam": entry},
    )
    return RadioModel(config).eval()


def picture(size, seed=0):
    """Smooth colors, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def as_batch(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def some_boxes(size, count=5, seed=0):
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * [size[1], size[0]]
    return np.sort(corners, axis=1).reshape(count, 4)  # x0, y0, x1, y1


def predictor_masks(predictor, boxes, best_of_three):
    """All boxes through SamPredictor at once: bool (N, H, W) and its IoU predictions, by its own argument names."""
    scaled = torch.as_tensor(predictor.transform.apply_boxes(boxes, predictor.original_size), dtype=torch.float)
    masks, predicted, _ = predictor.predict_torch(None, None, boxes=scaled, multimask_output=best_of_three)
    chosen = [int(np.argmax(row.numpy())) for row in predicted]
    return torch.stack([m[i] for m, i in zip(masks, chosen, strict=True)]), predicted.max(dim=1).values


def literal_iou(a, b):
    """Sets of pixels."""
    first = {tuple(p) for p in np.argwhere(np.asarray(a)).tolist()}
    second = {tuple(p) for p in np.argwhere(np.asarray(b)).tolist()}
    return len(first & second) / len(first | second)
