"""The backbones of the paper's Table 6 beside the two teachers: parameters, FLOPs and images/s on this machine.

`python benchmarks/backbones.py [--rows NAME ...] [--rounds N] [--batch-sizes N ...] [--device D]`

All rows are timed in turn in one process, round after round, and each number is the median of the rounds: a machine
that slows down slows all rows. On a CPU the clock counts processor time, divided by the threads: other programs on the
machine do not count. Weights are random, which changes no time. What a ratio says is how many times as fast a row is
as a teacher; the paper's ratios (A100, TensorRT, half precision, batch 128) stand beside it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import timm
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from transformers_radio.evaluation.speed.cost import count_flops
from transformers_radio.modeling import ERadioConfig, ERadioModel, RadioConfig, RadioModel

SIDE = 224  # pixels
SECONDS = 0.5  # a row runs at least this long in a round
CLIP, DINO = "OpenCLIP ViT-H/14", "DINOv2 ViT-g/14"


class FeaturesOf(nn.Module):
    """A timm network without its classifier: images -> features."""

    def __init__(self, name: str):
        super().__init__()
        self.model = timm.create_model(name, num_classes=0)

    def forward(self, images: torch.Tensor) -> Any:
        return self.model.forward_features(images)


def dinov2_giant() -> nn.Module:
    config = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        patch_size=14,
        image_size=518,
    )
    return Dinov2Model(config)


def eradio(size: str) -> nn.Module:
    return ERadioModel(ERadioConfig.from_size(size)).eval().fuse().to(memory_format=torch.channels_last)


def radio(size: str) -> nn.Module:
    return RadioModel(RadioConfig.from_size(size, num_cls_tokens=1))


@dataclass(frozen=True)
class Row:
    """A backbone.

    Attributes:
        build: makes it, with random weights.
        paper: images/s in the paper's Table 6; None for networks that it does not have.
        channels_last: whether its images come channels last.
    """

    build: Callable[[], nn.Module]
    paper: int | None = None
    channels_last: bool = False


ROWS = {
    CLIP: Row(lambda: FeaturesOf("vit_huge_patch14_clip_224"), 556),
    DINO: Row(dinov2_giant, 313),
    "E-RADIO-B": Row(lambda: eradio("b"), 6422, channels_last=True),
    "E-RADIO-B without upsampling": Row(lambda: eradio("b-no-upsample"), 7040, channels_last=True),
    "E-RADIO-L": Row(lambda: eradio("l"), 3472, channels_last=True),
    "E-RADIO, the released network": Row(lambda: eradio("released"), channels_last=True),
    "E-RADIO-XT": Row(lambda: eradio("xt"), channels_last=True),
    "E-RADIO-T": Row(lambda: eradio("t"), channels_last=True),
    "E-RADIO-S": Row(lambda: eradio("s"), channels_last=True),
    "RADIO ViT-B/16": Row(lambda: radio("vit-b-16")),
    "RADIO ViT-L/16": Row(lambda: radio("vit-l-16")),
}


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class Timed:
    """A row that was built."""

    row: Row
    model: nn.Module
    images: dict[int, torch.Tensor]  # by batch size
    rates: dict[int, list[float]]  # images/s of each round, by batch size

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.inference_mode()
    def measure(self, batch: int) -> None:
        images = self.images[batch]
        runs, seconds, started = 0, 0.0, now(images.device)
        while seconds < SECONDS:
            self.model(images)
            runs, seconds = runs + 1, now(images.device) - started
        self.rates[batch].append(runs * batch / seconds)

    def rate(self, batch: int) -> float:
        return statistics.median(self.rates[batch])


def build(name: str, batches: list[int], device: torch.device) -> Timed:
    row = ROWS[name]
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    model = row.build().eval().to(device)
    images = {batch: torch.rand(batch, 3, SIDE, SIDE, device=device).to(memory_format=layout) for batch in batches}
    return Timed(row, model, images, {batch: [] for batch in batches})


def compare(names: list[str], rounds: int, batches: list[int], device: torch.device) -> dict[str, Timed]:
    built = {name: build(name, batches, device) for name in names}
    with torch.inference_mode():
        for timed in built.values():  # what only the first pass makes
            for images in timed.images.values():
                timed.model(images)
    for _ in range(rounds):
        for batch in batches:
            for timed in built.values():
                timed.measure(batch)
    return built


def print_table(built: dict[str, Timed], batches: list[int]) -> None:
    teachers = [name for name in (CLIP, DINO) if name in built]
    header = ["backbone", "parameters (M)", "GFLOPs"]
    for batch in batches:
        header += [f"images/s, batch {batch}", *(f"x {name} (paper)" for name in teachers)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, timed in built.items():
        flops = count_flops(timed.model, next(iter(timed.images.values()))[:1])
        cells = [name, f"{timed.parameters / 1e6:.2f}", f"{flops / 1e9:.1f}"]
        for batch in batches:
            cells.append(f"{timed.rate(batch):.2f}")
            for teacher in teachers:
                published = ""
                if timed.row.paper and ROWS[teacher].paper:
                    published = f" ({timed.row.paper / ROWS[teacher].paper:.1f})"
                cells.append(f"{timed.rate(batch) / built[teacher].rate(batch):.2f}{published}")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{SIDE} pixels, float32, {torch.get_num_threads()} threads, {device}, median of {options.rounds} rounds\n")
    print_table(compare(options.rows, options.rounds, options.batch_sizes, device), options.batch_sizes)


if __name__ == "__main__":
    main()
