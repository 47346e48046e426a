"""Seconds and images per second of several encoders, measured in one interleaved run."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from tqdm import tqdm

Model = nn.Module | Callable[[torch.Tensor], object]


def throughput(
    models: Mapping[str, Model], inputs: Mapping[str, torch.Tensor], repeats: int = 10, warmup: int = 2
) -> dict[str, float]:
    """Images/s of every model by the median of its rounds; see `latencies`."""
    seconds = latencies(models, inputs, repeats, warmup)
    return {name: len(inputs[name]) / statistics.median(times) for name, times in seconds.items()}


def latencies(
    models: Mapping[str, Model], inputs: Mapping[str, torch.Tensor], repeats: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds that every model took for its batch, one number per round.

    Each round times every model once, so that a machine that slows down slows all of them: ratios hold even where
    absolute numbers drift. Timed is the forward pass on images that are on the device already, without gradients.

    Args:
        models: name -> module in eval mode, or any callable.
        inputs: name -> its batch (B, 3, H, W); the names are those of `models`. Sizes and devices may differ.
        repeats: timed rounds.
        warmup: rounds before them, which do not count.

    Raises:
        ValueError: names that differ, numbers out of range, or a module in training mode.
    """
    if not models or set(models) != set(inputs):
        raise ValueError(f"models and inputs must have the same names; got {sorted(models)} and {sorted(inputs)}.")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup is {warmup}; expected at least 1 and at least 0.")
    for name, model in models.items():
        if isinstance(model, nn.Module) and model.training:
            raise ValueError(f"{name!r} is in training mode; call .eval() on it before measuring.")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for step in tqdm(range(warmup + repeats), desc="throughput", unit="round"):
            for name, model in models.items():
                _synchronize(inputs[name])
                start = time.perf_counter()
                model(inputs[name])
                _synchronize(inputs[name])
                if step >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def throughput_conditions(model: Model, images: torch.Tensor) -> str:
    """What a number of `throughput` holds for, such as "batch 8, 432x432, float32, cpu (2 threads)"."""
    parameter = next(model.parameters(), images) if isinstance(model, nn.Module) else images
    batch, _, height, width = images.shape
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"batch {batch}, {height}x{width}, {dtype}, {device_name(images.device)}"


def device_name(device: torch.device) -> str:
    """Such as "cpu (2 threads)" or "NVIDIA A100-SXM4-80GB"."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _synchronize(images: torch.Tensor) -> None:
    if images.device.type != "cpu":  # kernels are queued: without waiting, only the queueing would be timed
        torch.accelerator.synchronize(images.device)
