"""`eval features`: high-norm patches, activation statistics, and the noise of the position table."""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from omegaconf import MISSING
from tqdm import tqdm

from transformers_radio.data.config import SourceConfig
from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import Source
from transformers_radio.disk import write_text
from transformers_radio.evaluation.images.resize import stretch_image
from transformers_radio.evaluation.images.sampled import SAMPLE_SEED, shuffled
from transformers_radio.evaluation.images.split_files import in_words_of_evaluation, own_split_name
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.paths import path_name
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.precision import DTYPES

from .figure import features_figure
from .statistics import (
    DEAD_SHARE,
    ChannelStatistics,
    PatchNorms,
    channel_statistics,
    patch_norms,
    position_noise,
    position_table,
)

POSITIONS_NAMED = 10


@dataclass
class FeaturesConfig:
    """Settings of the task."""

    data: str = field(
        default=MISSING, metadata={"help": "Images, with or without labels: everything that training reads."}
    )
    name: str | None = field(
        default=None, metadata={"help": "What results call the data. null: the last part of `data`."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several."}
    )
    split: str = field(default="validation", metadata={"help": "The images that are encoded."})
    image_column: str | None = field(default=None, metadata={"help": "null: the only one."})
    images: int = field(default=64, metadata={"help": "How many are drawn, with seed 0."})
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels. null: each model's own."})
    outlier_factor: float = field(
        default=3.0, metadata={"help": "A patch whose norm is above so many times the median is an outlier."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the models.", "choices": tuple(DTYPES)})
    batch_size: int = field(default=8, metadata={"help": "Images that are encoded together."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the result."})


class Features(Task):
    """Norms, channels and position noise. A picture is beside each result, all channels are in its statistics.json.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before any image is encoded.
    """

    name = "features"
    config_class = FeaturesConfig
    config: FeaturesConfig
    counted = (*ENCODER_COUNTED, "image_size", "images", "outlier_factor", "seed", "files")

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        for name in ("images", "batch_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} is {getattr(config, name)}; expected at least 1.")
        if not config.outlier_factor > 1:
            raise ValueError(f"outlier_factor is {config.outlier_factor}; expected more than 1.")
        device = Accelerator(mixed_precision="no").device
        encoders = [load_encoder(spec, config.image_size, config.dtype, device) for spec in models]
        self.files, self.skipped = _read(config)
        files = _digest(self.files)
        jobs = []
        for encoder in encoders:
            settings = {
                **{name: value for name, value in asdict(config).items() if name not in ("overwrite", "batch_size")},
                **encoder.settings(),
                "image_size": encoder.image_size,
                "seed": SAMPLE_SEED,
                "files": files,
            }
            jobs.append(Job.of(encoder, config.name or path_name(config.data), settings))
        return jobs

    def measure(self, job: Job, folder: Path) -> Measured:
        encoder, factor = job.encoder, self.config.outlier_factor
        features, grid = _encode(encoder, self.files, self.config.batch_size)
        norms, channels = patch_norms(features, grid, factor), channel_statistics(features)
        table = position_table(encoder.model)
        _write_statistics(norms, channels, folder / "statistics.json")
        title = f"{encoder.name}, {encoder.image_size} px"
        features_figure(title, norms, channels, table, folder.with_name(f"{folder.name}.png"))
        metrics = {**_metrics(norms, channels), **_noise(encoder, table, grid)}
        return Measured(
            # if all features are constant, some metrics have no value
            {name: value for name, value in metrics.items() if math.isfinite(value)},
            f"{len(self.files)} whole images at {encoder.image_size} x {encoder.image_size}, {grid[0]} x {grid[1]} "
            f"patches; high-norm: above {factor:g} x the median; dead: a channel whose deviation is below "
            f"{DEAD_SHARE:g} of the median channel's; kurtosis: excess; position noise: share of the table's energy "
            "above 1/4 cycle a patch, white noise has 80 %",
            {
                "images": len(self.files),
                "skipped_images": self.skipped,
                "patches": norms.norms.numel(),
                "channels": len(channels.std),
            },
            {
                # row, column, share of the images
                "high_norm_positions": [list(one) for one in norms.most_frequent(POSITIONS_NAMED)],
                "largest_channel": channels.largest,
                "position_table": None if table is None else list(table.shape),
            },
        )


def _read(config: FeaturesConfig) -> tuple[list[bytes], int]:
    """Readable images, undecoded, and the number of unreadable ones that were met."""
    source = _open(config)

    def read(shard: int) -> Iterator[tuple[Any, str]]:
        return ((image, key) for key, image in source.records(shard))

    files: list[bytes] = []
    skipped = Counter[str]()
    # If the data comes class by class, the first ones would all be of the first class.
    for image, _ in shuffled(len(source.shards), read):
        content = source.read(image)
        try:
            decode_rgb(content)
        except SkippedImage as error:
            skipped[error.reason] += 1
            continue
        files.append(content)
        if len(files) == config.images:
            break
    if not files:
        raise ValueError(f"{config.data} ({config.split}) holds no readable image; skipped: {dict(skipped)}.")
    return files, skipped.total()


def _open(config: FeaturesConfig) -> Source:
    split = own_split_name(config.data, config.split)
    try:
        return Source(SourceConfig(config.data, split, config.config_name, config.image_column))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(in_words_of_evaluation(str(error))) from error


def _digest(files: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(file).digest())
    return digest.hexdigest()


def _encode(encoder: VisionEncoder, files: list[bytes], batch_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """float32 (N, h*w, C) on the CPU, and (h, w)."""
    encoded, grid, size = [], (0, 0), (encoder.image_size, encoder.image_size)
    for start in tqdm(range(0, len(files), batch_size), desc=f"{encoder.name} features", unit="batch"):
        images = [stretch_image(decode_rgb(file), size) for file in files[start : start + batch_size]]
        features, grid = encoder.features(torch.stack(images).to(encoder.device).float() / 255)
        encoded.append(features.cpu())
    return torch.cat(encoded), grid


def _metrics(norms: PatchNorms, channels: ChannelStatistics) -> dict[str, float]:
    metrics = {
        "Norm, median": norms.median,
        "Norm, 99 %": norms.p99,
        "Norm, largest": norms.norms.max().item(),
        "High-norm patches": 100 * norms.share,
        "Channel mean, median": channels.mean.median().item(),
        "Channel std, median": channels.std.median().item(),
        "Channel kurtosis, median": channels.kurtosis.nanmedian().item(),
        "Largest channel over median": channels.largest_ratio,
        "Dead channels": 100 * channels.dead.double().mean().item(),
    }
    if norms.share > 0:
        metrics["High-norm patches at the border"] = 100 * norms.border_share
    return metrics


def _noise(encoder: VisionEncoder, table: torch.Tensor | None, grid: tuple[int, int]) -> dict[str, float]:
    """Noise of the table as it is stored; and as a student resizes it, if its patches are not those of the table."""
    if table is None:
        return {}
    tables = {"Position noise": table}
    if encoder.is_student and grid != tuple(table.shape[:2]):
        stored = table.permute(2, 0, 1)[None]  # (h, w, D) -> (1, D, h, w)
        resized = F.interpolate(stored, size=grid, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        tables["Position noise, resized"] = resized
    noise = {}
    for name, one in tables.items():
        with contextlib.suppress(ValueError):  # a constant table, or a single row of it, has none
            noise[name] = 100 * position_noise(one)
    return noise


def _write_statistics(norms: PatchNorms, channels: ChannelStatistics, path: Path) -> None:
    statistics = {
        "mean": channels.mean.tolist(),
        "std": channels.std.tolist(),
        "kurtosis": [value if math.isfinite(value) else None for value in channels.kurtosis.tolist()],
        "dead": channels.dead.nonzero()[:, 0].tolist(),
        "mean_norm": norms.norms.mean(dim=0).tolist(),  # (h, w)
        "high_norm_share": norms.positions.tolist(),  # (h, w)
    }
    write_text(path, json.dumps(statistics) + "\n")
