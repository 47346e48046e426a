"""The probe's head and loss in seconds: frozen features in memory, no augmentation, a sample of the pixels a step."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .confusion import IGNORE_INDEX, confusion_matrix, iou_scores
from .segmentation import LinearHead
from .segmentation_inference import Encoder, encode_grid

ENCODED_AT_ONCE = 64  # images
WARMUP_SHARE = 0.05  # of the steps


def probe_miou(
    encode: Encoder,
    train_images: torch.Tensor,
    train_masks: torch.Tensor,
    validation_images: torch.Tensor,
    validation_masks: torch.Tensor,
    num_classes: int,
    steps: int = 400,
    seed: int = 0,
    batch_size: int = 16,
    pixels: int = 256,
    learning_rate: float = 1e-2,
    ignore_index: int = IGNORE_INDEX,
    description: str = "linear probe",
) -> float:
    """Percent mean IoU of a linear head on frozen features of images that are all of one size; for the quickstart.

    As `segmentation_probe`: batch norm and a 1x1 convolution, AdamW without weight decay, warm-up and a linear decay
    to 0, cross-entropy of logits resized bilinearly to the masks, so that encoders of any grid are measured at the
    masks' size. Unlike it: every image is encoded once, as a whole and unaugmented; a step sees `pixels` random pixels
    of each mask, an unbiased estimate of the loss; the learning rate is ten times the paper's, for few steps.

    Args:
        encode: float images in [0, 1] (B, 3, H, W) -> features (B, h*w, C) and the grid (h, w). It resizes by itself
            where the encoder has another size than the images.
        train_images, validation_images: uint8 (N, 3, H, W) and (M, 3, H, W).
        train_masks, validation_masks: integers (N, H', W') and (M, H', W'), class indices or `ignore_index`.

    Raises:
        ValueError: no images, other shapes, a class outside 0 .. num_classes - 1.
    """
    _check(train_images, train_masks, "train", num_classes, ignore_index)
    _check(validation_images, validation_masks, "validation", num_classes, ignore_index)
    features = _encode_all(encode, train_images, f"{description}: train")
    queries = _encode_all(encode, validation_images, f"{description}: validation")

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.manual_seed(seed)
        head = LinearHead(features.shape[1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    resize = _bilinear_weights(features.shape[-2:], train_masks.shape[-2:])  # (h*w, H'*W')
    for _ in tqdm(range(steps), desc=description, unit="step"):
        chosen = torch.randint(len(features), (batch_size,), generator=generator)
        places = torch.randint(resize.shape[1], (pixels,), generator=generator)
        logits = head(features[chosen].float()).flatten(2) @ resize[:, places]  # (B, K, h*w) -> (B, K, pixels)
        masks = train_masks[chosen].flatten(1)[:, places].long()
        loss = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum") / masks.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _score(head.eval(), queries, validation_masks, num_classes, ignore_index)["mIoU"]


def _encode_all(encode: Encoder, images: torch.Tensor, description: str) -> torch.Tensor:
    """bfloat16 (N, C, h, w)."""
    batches = tqdm(images.split(ENCODED_AT_ONCE), desc=description, unit="batch")
    return torch.cat([encode_grid(encode, batch.float() / 255).bfloat16() for batch in batches])


def _bilinear_weights(grid: torch.Size, size: torch.Size) -> torch.Tensor:
    """(h*w, H*W) float32: maps (..., h*w) @ weights are the maps resized bilinearly, align_corners=False.

    The resize of each one-hot map. A column has at most four weights, so a few pixels cost a few columns.
    """
    one_hot = torch.eye(grid.numel()).unflatten(1, grid)  # (h*w, h, w)
    return F.interpolate(one_hot[None], size=tuple(size), mode="bilinear", align_corners=False)[0].flatten(1)


@torch.no_grad()
def _score(head: nn.Module, features: torch.Tensor, masks: torch.Tensor, num_classes: int, ignore_index: int) -> dict:
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for maps, labels in zip(features.split(8), masks.split(8), strict=True):
        # With classes last in memory, resize and arg-max take half the time.
        logits = head(maps.float()).contiguous(memory_format=torch.channels_last)
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        predictions = logits.permute(0, 2, 3, 1).argmax(dim=-1)  # (B, K, H, W) -> (B, H, W, K) -> (B, H, W)
        confusion += confusion_matrix(predictions, labels, num_classes, ignore_index)
    return iou_scores(confusion)


def _check(images: torch.Tensor, masks: torch.Tensor, name: str, num_classes: int, ignore_index: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"The {name} images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, 3, H, W).")
    if masks.ndim != 3 or len(masks) != len(images):
        raise ValueError(f"The {name} masks are {tuple(masks.shape)}; expected ({len(images)}, H, W), one an image.")
    wrong = (masks != ignore_index) & ((masks < 0) | (masks >= num_classes))
    if wrong.any():
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(
            f"The {name} mask {image} has the id {masks[image][wrong[image]][0].item()}; expected 0 to "
            f"{num_classes - 1} or {ignore_index} for pixels left out."
        )
