"""The probe's head and loss in seconds: frozen features in memory, no augmentation, few pixels per step."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .miou import IGNORE_INDEX, MeanIoU
from .probe import LinearHead

BATCH_SIZE = 16  # images per step
PIXELS = 256  # of each mask that a step sees
LEARNING_RATE = 1e-2
WARMUP_SHARE = 0.05  # of the steps
STRIDE = 2  # of the pixels that are scored, down and across: neighbors say nearly the same

# An encoder's maps, floating point (N, C, h, w); masks of the same images, integers (N, H, W), class indices or 255
MapsAndMasks = tuple[torch.Tensor, torch.Tensor]


def probe_miou(
    train: MapsAndMasks,
    validation: MapsAndMasks,
    num_classes: int,
    steps: int = 400,
    seed: int = 0,
    description: str = "linear probe",
) -> float:
    """Percent mean IoU of a linear head on frozen features of images that are all of one size; for the quickstart.

    As `segmentation_probe`: batch norm and a 1x1 convolution, AdamW without weight decay, warm-up and a linear decay
    to 0, cross-entropy of logits resized bilinearly to the masks, so that encoders of any grid are measured at the
    masks' size. Unlike it: features are those of whole, unaugmented images, computed once; a step sees 256 random
    pixels of each mask, an unbiased estimate of the loss; every second pixel of every second row is scored; the
    learning rate is ten times the paper's, for few steps.

    Raises:
        ValueError: no images, other shapes, a class outside 0 .. num_classes - 1.
    """
    _check(*train, "train", num_classes)
    _check(*validation, "validation", num_classes)
    features, masks = train

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        head = LinearHead(features.shape[1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    resize = _bilinear_weights(features.shape[-2:], masks.shape[-2:])  # (h*w, H*W)
    for _ in tqdm(range(steps), desc=description, unit="step"):
        chosen = torch.randint(len(features), (BATCH_SIZE,), generator=generator)
        places = torch.randint(resize.shape[1], (PIXELS,), generator=generator)
        logits = head(features[chosen].float()).flatten(2) @ resize[:, places]  # (B, K, h*w) -> (B, K, pixels)
        labels = masks[chosen].flatten(1)[:, places].long()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _score(head.eval(), *validation, num_classes)


def _bilinear_weights(grid: torch.Size, size: torch.Size) -> torch.Tensor:
    """(h*w, H*W) float32: maps (..., h*w) @ weights are the maps resized bilinearly, align_corners=False.

    They are the resizes of all one-hot maps. A pixel costs one column, which has at most four weights.
    """
    one_hot = torch.eye(grid.numel()).unflatten(1, grid)  # (h*w, h, w)
    return F.interpolate(one_hot[None], size=tuple(size), mode="bilinear", align_corners=False)[0].flatten(1)


@torch.no_grad()
def _score(head: nn.Module, features: torch.Tensor, masks: torch.Tensor, num_classes: int) -> float:
    places = torch.arange(masks[0].numel()).view(masks.shape[1:])[::STRIDE, ::STRIDE].flatten()
    resize = _bilinear_weights(features.shape[-2:], masks.shape[-2:])[:, places]  # (h*w, P)
    metric = MeanIoU(num_classes)
    for maps, labels in zip(features.split(64), masks.split(64), strict=True):
        logits = head(maps.float()).flatten(2) @ resize  # (B, K, h*w) -> (B, K, P)
        metric.add(prediction=logits.argmax(dim=1), reference=labels.flatten(1)[:, places])
    return metric.compute()["mIoU"]


def _check(features: torch.Tensor, masks: torch.Tensor, name: str, num_classes: int) -> None:
    if not features.is_floating_point() or features.ndim != 4 or len(features) == 0:
        raise ValueError(
            f"The {name} features are {features.dtype} {tuple(features.shape)}; expected floating point (N, C, h, w)."
        )
    if masks.ndim != 3 or len(masks) != len(features):
        raise ValueError(
            f"The {name} masks are {tuple(masks.shape)}; expected ({len(features)}, H, W), one per image."
        )
    wrong = (masks != IGNORE_INDEX) & ((masks < 0) | (masks >= num_classes))
    if wrong.any():
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(
            f"The {name} mask {image} has the id {masks[image][wrong[image]][0].item()}; expected 0 to "
            f"{num_classes - 1} or {IGNORE_INDEX} for pixels left out."
        )
