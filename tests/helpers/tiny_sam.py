"""A tiny student with a SAM adaptor, pictures and boxes, and segment_anything's own predictor."""

import numpy as np
import torch
from PIL import Image

from transformers_radio.modeling import RadioConfig, RadioModel

SIDE, PATCH, WIDTH, NECK = 64, 8, 48, 32
SIZES = [(40, 56), (150, 90), (64, 64), (33, 64)]  # (H, W): smaller than SAM's input, larger, equal, and padded only


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
