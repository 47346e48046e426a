"""The small SAM of the quickstart: segment_anything's own modules, trained on boxes and points with masks."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch.nn import functional as F

from transformers_radio.evaluation.sam_coco.metrics import mask_overlap

from .teacher_data import MEAN, STD, Split, batches, jitter, sincos_positions, train_steps

SIDE, PATCH = 128, 16  # pixels: 64 patches
GRID = SIDE // PATCH
WIDTH, DEPTH, HEADS, MLP_RATIO = 192, 4, 3, 3.5
WINDOW, GLOBAL_BLOCKS = 4, (1, 3)
BATCH = 32  # scenes per step
PROMPT_WIDTH, DECODER_MLP, MASK_CHANNELS, IOU_WIDTH = 64, 128, 16, 64


def build_sam() -> Sam:
    """The architecture, with fresh weights.

    What is not in the constants is as in the released SAMs: a decoder of depth 2 with 8 heads, three masks besides the
    single one, an IoU head of three layers.
    """
    encoder = ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP_RATIO,
        out_chans=PROMPT_WIDTH,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=GLOBAL_BLOCKS,
    )
    prompts = PromptEncoder(
        embed_dim=PROMPT_WIDTH,
        image_embedding_size=(GRID, GRID),
        input_image_size=(SIDE, SIDE),
        mask_in_chans=MASK_CHANNELS,
    )
    decoder = MaskDecoder(
        transformer_dim=PROMPT_WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_WIDTH, num_heads=8, mlp_dim=DECODER_MLP),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=IOU_WIDTH,
    )
    return Sam(encoder, prompts, decoder, [255 * m for m in MEAN], [255 * s for s in STD])


def decode_masks(
    sam: Sam, embeddings: torch.Tensor, boxes: torch.Tensor | None, points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes one prompt for each image embedding; SAM's own decoder call takes many prompts of a single image.

    Args:
        embeddings: (N, C, 8, 8) from the image encoder.
        boxes: (N, 4) x0 y0 x1 y1 in pixels, or None.
        points: (N, 2) x y in pixels, each on the object, or None.

    Returns:
        (N, 4, 32, 32) mask logits and (N, 4) predicted IoU: the single mask first, then three for an unclear prompt.
    """
    clicks = None if points is None else (points[:, None], torch.ones(len(points), 1))
    sparse, dense = sam.prompt_encoder(points=clicks, boxes=boxes, masks=None)
    decoder = sam.mask_decoder
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (5, C)
    tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
    position = sam.prompt_encoder.get_dense_pe().expand(len(sparse), -1, -1, -1)
    tokens, image = decoder.transformer(embeddings + dense, position, tokens)
    # (N, 64, C) -> (N, C, 8, 8), then four times finer
    fine = decoder.output_upscaling(image.transpose(1, 2).reshape(embeddings.shape))
    weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    return torch.einsum("nmc,nchw->nmhw", weights, fine), decoder.iou_prediction_head(tokens[:, 0])


def _mask_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """SAM's 20 : 1 focal and dice losses of (N, M, h, w) logits against (N, 1, h, w) targets. Returns (N, M)."""
    targets = targets.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    certainty = torch.exp(-entropy)  # probability of the right answer
    balance = 0.25 * targets + 0.75 * (1 - targets)
    focal = (balance * (1 - certainty) ** 2 * entropy).mean(dim=(-2, -1))
    chance = logits.sigmoid()
    overlap = 2 * (chance * targets).sum(dim=(-2, -1)) + 1
    dice = 1 - overlap / (chance.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1)) + 1)
    return 20 * focal + dice


def train_sam(directory: Path, data: Split, steps: int = 3000, seed: int = 0) -> dict[str, Any]:
    """Trains on a box and a point for two objects of each scene, and writes sam.pth, a plain state dict.

    Returns:
        What was done: steps, images seen, seconds, the last loss.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sam = build_sam()
    with torch.no_grad():
        positions = sincos_positions(GRID, WIDTH).reshape(1, GRID, GRID, WIDTH)
        sam.image_encoder.pos_embed.copy_(positions)
    order = batches(len(data.images), BATCH, rng)
    started = time.monotonic()
    for _, update in train_steps("sam", sam, steps, peak=1e-3):
        chosen = next(order)
        # two prompts per scene: the main object, and any of the objects
        which = torch.tensor([k for i in chosen for k in (0, int(rng.integers(len(data.boxes[int(i)]))))])  # (2 B,)
        owner = chosen.repeat_interleave(2)  # (2 B,)
        masks = data.instances[owner] == (which + 1)[:, None, None]  # (2 B, 128, 128)
        boxes = torch.stack([data.boxes[int(i)][int(k)] for i, k in zip(owner, which, strict=True)]).float()
        boxes = boxes + torch.from_numpy(rng.normal(0, 2, boxes.shape).astype(np.float32))  # nobody's boxes are exact
        flat = masks.flatten(1).float()
        inside = torch.multinomial(flat, 1)[:, 0]  # a pixel of the object
        points = torch.stack([inside % SIDE, inside // SIDE], dim=1).float()
        targets = F.avg_pool2d(masks[:, None].float(), SIDE // (4 * GRID))  # (2 B, 1, 32, 32)

        images = jitter(sam.preprocess(data.images[chosen].float()), rng)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = sam.image_encoder(images).repeat_interleave(2, dim=0)
            decoded = [decode_masks(sam, embeddings, boxes, None), decode_masks(sam, embeddings, None, points)]
        loss = torch.zeros(())
        for logits, predicted_iou in decoded:
            losses = _mask_losses(logits.float(), targets)  # (2 B, 4)
            intersection, union = mask_overlap(logits.detach() > 0, targets > 0.5)
            iou = intersection / union.clamp(min=1)
            loss = loss + losses[:, 0].mean() + losses[:, 1:].min(dim=1).values.mean()
            loss = loss + F.mse_loss(predicted_iou.float(), iou)
        update(loss)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.half() for name, value in sam.state_dict().items()}, directory / "sam.pth")
    seconds = round(time.monotonic() - started)
    return {"steps": steps, "images_seen": steps * BATCH, "seconds": seconds, "loss": round(loss.item(), 4)}
