"""The probe's head and loss in seconds: frozen features in memory, no augmentation, a sample of the pixels a step."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .confusion import IGNORE_INDEX, confusion_matrix, iou_scores
from .probe import LinearHead

WARMUP_SHARE = 0.05  # of the steps
STRIDE = 2  # of the pixels that are scored, down and across: neighbors say nearly the same


def probe_miou(
    train_features: torch.Tensor,
    train_masks: torch.Tensor,
    validation_features: torch.Tensor,
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
    masks' size. Unlike it: features are those of whole, unaugmented images, computed once; a step sees `pixels` random
    pixels of each mask, an unbiased estimate of the loss; every second pixel of every second row is scored; the
    learning rate is ten times the paper's, for few steps.

    Args:
        train_features, validation_features: an encoder's maps, floating point (N, C, h, w) and (M, C, h, w).
        train_masks, validation_masks: integers (N, H, W) and (M, H, W), class indices or `ignore_index`.

    Raises:
        ValueError: no images, other shapes, a class outside 0 .. num_classes - 1.
    """
    _check(train_features, train_masks, "train", num_classes, ignore_index)
    _check(validation_features, validation_masks, "validation", num_classes, ignore_index)

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.manual_seed(seed)
        head = LinearHead(train_features.shape[1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    resize = _bilinear_weights(train_features.shape[-2:], train_masks.shape[-2:])  # (h*w, H*W)
    for _ in tqdm(range(steps), desc=description, unit="step"):
        chosen = torch.randint(len(train_features), (batch_size,), generator=generator)
        places = torch.randint(resize.shape[1], (pixels,), generator=generator)
        logits = head(train_features[chosen].float()).flatten(2) @ resize[:, places]  # (B, K, h*w) -> (B, K, pixels)
        masks = train_masks[chosen].flatten(1)[:, places].long()
        loss = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum") / masks.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _score(head.eval(), validation_features, validation_masks, num_classes, ignore_index)["mIoU"]


def _bilinear_weights(grid: torch.Size, size: torch.Size) -> torch.Tensor:
    """(h*w, H*W) float32: maps (..., h*w) @ weights are the maps resized bilinearly, align_corners=False.

    The resize of each one-hot map. A column has at most four weights, so a few pixels cost a few columns.
    """
    one_hot = torch.eye(grid.numel()).unflatten(1, grid)  # (h*w, h, w)
    return F.interpolate(one_hot[None], size=tuple(size), mode="bilinear", align_corners=False)[0].flatten(1)


@torch.no_grad()
def _score(head: nn.Module, features: torch.Tensor, masks: torch.Tensor, num_classes: int, ignore_index: int) -> dict:
    places = torch.arange(masks[0].numel()).view(masks.shape[1:])[::STRIDE, ::STRIDE].flatten()
    resize = _bilinear_weights(features.shape[-2:], masks.shape[-2:])[:, places]  # (h*w, P)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for maps, labels in zip(features.split(64), masks.split(64), strict=True):
        logits = head(maps.float()).flatten(2) @ resize  # (B, K, h*w) -> (B, K, P)
        confusion += confusion_matrix(logits.argmax(dim=1), labels.flatten(1)[:, places], num_classes, ignore_index)
    return iou_scores(confusion)


def _check(features: torch.Tensor, masks: torch.Tensor, name: str, num_classes: int, ignore_index: int) -> None:
    if not features.is_floating_point() or features.ndim != 4 or len(features) == 0:
        raise ValueError(
            f"The {name} features are {features.dtype} {tuple(features.shape)}; expected floating point (N, C, h, w)."
        )
    if masks.ndim != 3 or len(masks) != len(features):
        raise ValueError(
            f"The {name} masks are {tuple(masks.shape)}; expected ({len(features)}, H, W), one per image."
        )
    wrong = (masks != ignore_index) & ((masks < 0) | (masks >= num_classes))
    if wrong.any():
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(
            f"The {name} mask {image} has the id {masks[image][wrong[image]][0].item()}; expected 0 to "
            f"{num_classes - 1} or {ignore_index} for pixels left out."
        )
