"""The linear segmentation probe: a frozen encoder, batch norm and a 1x1 convolution (paper section 5.3).

output_dir/
  settings.json      what is probed and how; another probe is refused
  checkpoint.pt      head, optimizer and position, replaced whole
  head.safetensors   the trained head; its names are those of RadioForSemanticSegmentation
  result.json        the report, written last
"""

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm.auto import tqdm

from transformers_radio.data.lanes import exit_with_parent
from transformers_radio.disk import differences, replace_whole, write_json, writing
from transformers_radio.teachers.checkpoints import read_file

from .config import SegmentationConfig, SegmentationData
from .data import Sample, Samples, SegmentationSplit, data_settings
from .inference import Encoder, Head, encode_grid, image_logits
from .miou import IGNORE_INDEX, MeanIoU
from .transforms import fitted_size, resize_bilinear, training_sample

LOG_EVERY = 20  # iterations
FREE_FIELDS = ("num_workers", "checkpoint_every")  # may differ when a probe is resumed: they change no bit


class FrozenInputBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the batches of all processes together, for inputs without gradients.

    The same as nn.SyncBatchNorm, which refuses CPUs. No gradient flows to frozen features, so the statistics need
    none either.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return super().forward(input)
        if input.requires_grad:
            raise ValueError("The features require gradients, but the statistics over processes pass none on.")
        totals = torch.cat([input.sum(dim=(0, 2, 3)), input.new_tensor([input.numel() / input.shape[1]])])
        torch.distributed.all_reduce(totals)
        mean, count = totals[:-1] / totals[-1], totals[-1]
        deviations = (input - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
        torch.distributed.all_reduce(deviations)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(deviations / (count - 1), self.momentum)
        return F.batch_norm(input, mean, deviations / count, self.weight, self.bias, training=False, eps=self.eps)


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution: (B, dim, h, w) -> logits (B, num_classes, h, w)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.batch_norm = FrozenInputBatchNorm(dim)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as mmsegmentation's heads begin
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.batch_norm(features))


def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Cross-entropy of logits (B, K, h, w), resized bilinearly to the masks, against masks int64 (B, H, W).

    The sum over labeled pixels is divided by the number of all pixels, as mmsegmentation does by default; so an
    update does not depend on how the images of a batch are spread over processes.
    """
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum") / masks.numel()


class _ErrorsAsItems(Dataset):
    """Items, or the error that an item is refused for, which `_raise_errors` raises in the main process.

    An error raised in a worker would have the worker's traceback as its message.
    """

    def __init__(self, items: Any):
        self.items = items

    def __getitem__(self, index: int) -> Any:
        try:
            return self.items[index]
        except (ValueError, OSError) as error:
            return error


def _collate(items: list[Any]) -> Any:
    """A batch, or the first error among its items."""
    return next((item for item in items if isinstance(item, Exception)), None) or default_collate(items)


def _raise_errors(loader: DataLoader) -> Iterator[Any]:
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


class _TrainingCrops(Dataset):
    """The crop at each position of the endless training sequence, a function of seed and position alone.

    So there is no random state to save, and the number of workers and processes changes nothing.
    """

    def __init__(self, samples: Samples, config: SegmentationConfig, ignore_index: int):
        self.samples, self.config, self.ignore_index = samples, config, ignore_index

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(position, len(self.samples))
        image, mask, _ = self.samples[_epoch_order(len(self.samples), self.config.seed, epoch)[place]]
        generator = np.random.default_rng([self.config.seed, 1, position])
        return training_sample(image, mask, self.config, generator, self.ignore_index)


class _Positions(Sampler[list[int]]):
    """The positions of this process's share of every batch, for the iterations `start` to `stop` - 1.

    It is a class because a DataLoader with workers iterates over it more than once.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int, processes: int):
        self.steps, self.batch_size, self.share = range(start, stop), batch_size, batch_size // processes
        self.offset = rank * self.share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.offset
            yield list(range(first, first + self.share))


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, 0, epoch]).permutation(count).tolist()


def train_head(
    encode: Encoder,
    samples: Samples,
    num_classes: int,
    config: SegmentationConfig,
    checkpoint: Path,
    ignore_index: int = IGNORE_INDEX,
) -> LinearHead:
    """The trained head, the same on every process. Resumes from `checkpoint` where that file exists.

    Raises:
        ValueError: a batch that does not divide over the processes, or anything that a sample is refused for.
        FloatingPointError: the loss is not finite.
    """
    accelerator = Accelerator(mixed_precision="no")  # the encoder has its own; head and loss are float32
    device = accelerator.device
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected a multiple of the {accelerator.num_processes} processes."
        )
    dim = _known_features(encode, config, device).shape[1]
    torch.manual_seed(config.seed)
    head: nn.Module = LinearHead(dim, num_classes)
    betas = (config.beta1, config.beta2)
    optimizer: Any = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay
    )
    start = _load_checkpoint(checkpoint, head, optimizer)
    head, optimizer = accelerator.prepare(head.to(device), optimizer)
    head.train()
    progress = tqdm(
        _training_batches(samples, config, ignore_index, start),
        desc="linear probe",
        initial=start,
        total=config.iterations,
        unit="iteration",
        disable=not accelerator.is_main_process,
    )
    done = start
    for done, (images, masks) in enumerate(progress, start + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(done - 1)
        pixels = images.to(device, non_blocking=True).float() / 255
        features = encode_grid(encode, pixels, config.mixed_precision)
        loss = segmentation_loss(head(features), masks.to(device, non_blocking=True), ignore_index)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

        saving = done % config.checkpoint_every == 0 or done == config.iterations
        if saving or done % LOG_EVERY == 0:
            value = accelerator.reduce(loss.detach(), "mean").item()
            _check_loss(value, done - 1)
            progress.set_postfix_str(f"loss={value:.3f}", refresh=False)
        if saving and accelerator.is_main_process:
            _save_checkpoint(checkpoint, accelerator.unwrap_model(head), optimizer, done)
    if done != config.iterations:
        raise RuntimeError(f"The data ended after {done} of {config.iterations} iterations.")
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(head).eval()


def _load_checkpoint(checkpoint: Path, head: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of iterations that the file, if there is one, has brought head and optimizer to."""
    if not checkpoint.exists():
        return 0
    saved = read_file(checkpoint)
    head.load_state_dict(saved["head"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["iteration"]


def _save_checkpoint(checkpoint: Path, head: nn.Module, optimizer: Any, iteration: int) -> None:
    with writing(checkpoint), replace_whole(checkpoint) as temporary:
        saved = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        torch.save(saved, temporary)


def _check_loss(value: float, iteration: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss of iteration {iteration} is {value}; check the encoder's weights, or use mixed_precision=no. "
            "The last checkpoint is kept."
        )


def _training_batches(
    samples: Samples, config: SegmentationConfig, ignore_index: int, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields this process's share of every batch from iteration `start` on: images (B, 3, s, s), masks (B, s, s)."""
    state = PartialState()
    loader = DataLoader(
        _ErrorsAsItems(_TrainingCrops(samples, config, ignore_index)),
        collate_fn=_collate,
        batch_sampler=_Positions(
            start, config.iterations, config.batch_size, state.process_index, state.num_processes
        ),
        num_workers=config.num_workers,
        worker_init_fn=exit_with_parent,
        pin_memory=state.device.type == "cuda",
    )
    return _raise_errors(loader)


def _in_turn(samples: Samples, config: SegmentationConfig, title: str) -> Iterator[Sample]:
    """Yields this process's share of the samples, read in workers."""
    state = PartialState()
    share = range(state.process_index, len(samples), state.num_processes)
    loader: DataLoader = DataLoader(
        _ErrorsAsItems(samples),
        batch_size=None,
        sampler=share,
        num_workers=config.num_workers,
        worker_init_fn=exit_with_parent,
    )
    hidden = not state.is_main_process
    return iter(tqdm(_raise_errors(loader), desc=title, unit="image", total=len(share), disable=hidden))


@torch.no_grad()
def evaluate_segmentation(
    encode: Encoder,
    head: Head,
    samples: Samples,
    num_classes: int,
    config: SegmentationConfig,
    ignore_index: int = IGNORE_INDEX,
) -> dict[str, Any]:
    """Scores of `MeanIoU` at the label maps' own size, with the numbers of images and of pixels counted and left out.

    Every process of `accelerate launch` scores a share of the samples, and all return the scores of the whole.

    Args:
        encode: float images in [0, 1] (B, 3, H, W) -> features (B, h*w, C) and the grid (h, w).
        head: features (B, C, h, w) -> logits (B, num_classes, h, w).
    """
    device = PartialState().device
    metric = MeanIoU(num_classes, ignore_index)
    for image, mask, _ in _in_turn(samples, config, "segmenting"):
        size = fitted_size(image.shape[1], image.shape[2], config.long_side, config.short_side)
        resized = resize_bilinear(image, size).to(device).float() / 255
        logits = image_logits(encode, head, resized, config)
        logits = F.interpolate(logits[None], size=mask.shape, mode="bilinear", align_corners=False)[0]
        metric.add(prediction=logits.argmax(dim=0), reference=mask.to(device))
    metric.sum_over_processes()
    counted = int(metric.confusion.sum())
    counts = {"images": metric.images, "pixels": counted, "pixels_left_out": metric.pixels - counted}
    return counts | metric.compute()


def segmentation_probe(
    encode: Encoder, model_name: str, data: SegmentationData, config: SegmentationConfig, output_dir: str | Path
) -> dict[str, Any]:
    """Trains the probe on the split "train" and scores it on "validation"; the report, on every process.

    The same call resumes what a kill has stopped, to the same bits (on the same number of processes), and returns the
    report of a finished probe. Runs alone or under `accelerate launch`; not in a process that has trained with another
    mixed precision, which Accelerate refuses.

    Args:
        encode: float images in [0, 1] (B, 3, H, W), on Accelerate's device -> features (B, h*w, C) and the grid
            (h, w). It is called without gradients; put it in eval mode and on the device before.
        model_name: what is probed, for the report.

    Raises:
        FileExistsError: `output_dir` holds another probe.
        FileNotFoundError, ValueError: see `SegmentationSplit`, `SegmentationConfig.check` and `train_head`.
    """
    config.check()
    splits = SegmentationSplit(data, "train"), SegmentationSplit(data, "validation")
    train, validation = splits
    accelerator = Accelerator(mixed_precision="no")
    output = Path(output_dir)
    features = _known_features(encode, config, accelerator.device)
    settings = _settings(model_name, data, splits, config, features.shape[1])
    std = features.double().std().item()
    finished = _read_result(output, settings, std, splits)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if finished is not None:
        return finished
    if not (output / "checkpoint.pt").exists():
        for _ in _in_turn(validation, config, "checking the validation split"):
            pass  # what cannot be used would else be found after the training
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(output / "settings.json", {**settings, "features_std": std})
    classes, ignored = len(data.classes), data.ignore_index
    head = train_head(encode, train, classes, config, output / "checkpoint.pt", ignored)
    if accelerator.is_main_process:
        with replace_whole(output / "head.safetensors") as temporary:
            save_file(head.state_dict(), temporary)
    scores = evaluate_segmentation(encode, head, validation, classes, config, ignored)
    report = {
        "protocol": "linear probe (batch norm, 1x1 convolution) on frozen features, "
        f"{config.iterations} iterations of {config.batch_size} crops of {config.crop_size}; "
        f"test: {config.test_protocol}",
        **settings,
        "processes": accelerator.num_processes,
        **scores,
        "IoU": dict(zip(data.classes, scores["IoU"], strict=True)),
    }
    if accelerator.is_main_process:
        write_json(output / "result.json", report)
    accelerator.wait_for_everyone()
    return report


def _settings(
    model_name: str,
    data: SegmentationData,
    splits: tuple[SegmentationSplit, SegmentationSplit],
    config: SegmentationConfig,
    feature_dim: int,
) -> dict[str, Any]:
    """What is probed and how, as settings.json and the report have it."""
    return {
        "model": model_name,
        "data": data.name,
        **data_settings(data, *splits),
        "train_images": len(splits[0]),
        "validation_images": len(splits[1]),
        "num_classes": len(data.classes),
        "feature_dim": feature_dim,
        "probe": config.settings(),
    }


def _known_features(encode: Encoder, config: SegmentationConfig, device: torch.device) -> torch.Tensor:
    """Features (1, C, h, w) of an image of color patches, the same each time."""
    patches = torch.from_numpy(np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32))
    image = F.interpolate(patches, size=(config.crop_size, config.crop_size), mode="nearest")
    return encode_grid(encode, image.to(device), config.mixed_precision)


def _read_result(
    output: Path, settings: dict[str, Any], features_std: float, splits: tuple[SegmentationSplit, ...]
) -> dict[str, Any] | None:
    """The report, if the folder holds this probe finished. Another probe there is an error."""
    if not (output / "settings.json").exists():
        return None
    before = json.loads((output / "settings.json").read_text(encoding="utf-8"))
    before |= {f"{split.name} files": split.recognized(before.get(f"{split.name} files")) for split in splits}
    there, here = ({**values, **values["probe"]} for values in (before, settings))
    changed = differences(there, here, [name for name in here if name not in ("probe", *FREE_FIELDS)])
    # Other weights under the same name would get the old encoder's score. Devices differ by less than this.
    if not changed and not math.isclose(before["features_std"], features_std, rel_tol=1e-3):
        changed = ["the encoder's weights"]
    if changed:
        raise FileExistsError(
            f"{output} holds another probe; it differs in {', '.join(changed)}. Restore these to continue it, or "
            "choose another folder."
        )
    if not (output / "result.json").exists():
        return None
    return json.loads((output / "result.json").read_text(encoding="utf-8"))
