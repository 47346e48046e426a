"""The backbones of the paper's Table 6 beside the two teachers: parameters, FLOPs and images/s on this machine.

`python benchmarks/backbones.py [--rows NAME ...] [--rounds N] [--batch-sizes N ...] [--device D] [--picture FILE]`

All rows are timed in turn in one process, round after round, and each number is the median of the rounds: a machine
that slows down slows all rows. A row is built anew in each round, as all together fill 16 GB. On a CPU the clock
counts processor time, divided by the threads: other programs on the machine do not count. Weights are random, which
changes no time. What a ratio says is how many times as fast a row is as a teacher; the paper's ratios (A100, TensorRT,
half precision, batch 128) stand beside it. Batch norms of E-RADIO are fused. Networks of convolutions and their images
are channels last, transformers are not.

`--picture` draws images/s at the first batch size against parameters, and against the paper's zero-shot, k-NN and mIoU
for rows of its Table 6: the speed is measured here, the quality is that of the networks that the paper trained.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import timm
import torch
from matplotlib.axes import Axes
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from transformers_radio.evaluation import figure_style as style
from transformers_radio.evaluation.speed.cost import count_flops
from transformers_radio.modeling import ERadioConfig, ERadioModel, RadioConfig, RadioModel

SIDE = 224  # pixels
SECONDS = 0.5  # a row runs at least this long in a round
CLIP, DINO = "OpenCLIP ViT-H/14", "DINOv2 ViT-g/14"


class FeaturesOf(nn.Module):
    """A timm network without its classifier: images -> features."""

    def __init__(self, name: str, **options: Any):
        super().__init__()
        self.model = timm.create_model(name, num_classes=0, **options)

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
    return ERadioModel(ERadioConfig.from_size(size)).eval().fuse()


def radio(size: str) -> nn.Module:
    return RadioModel(RadioConfig.from_size(size, num_cls_tokens=1))


class Paper(NamedTuple):
    """A row of the paper's Table 6."""

    images_per_second: int
    zero_shot: float | None = None  # percent, like the others
    knn: float | None = None
    miou: float | None = None  # ADE20K


@dataclass(frozen=True)
class Row:
    """A backbone.

    Attributes:
        build: makes it, with random weights.
        paper: its row of Table 6; None for networks that are not there.
        channels_last: whether weights and images come channels last.
    """

    build: Callable[[], nn.Module]
    paper: Paper | None = None
    channels_last: bool = True


ROWS = {
    CLIP: Row(lambda: FeaturesOf("vit_huge_patch14_clip_224"), Paper(556, 77.19, 81.10, 40.04), channels_last=False),
    DINO: Row(dinov2_giant, Paper(313, None, 83.41, 47.53), channels_last=False),
    "E-RADIO-B": Row(lambda: eradio("b"), Paper(6422, 75.19, 82.21, 44.03)),
    "E-RADIO-B without upsampling": Row(lambda: eradio("b-no-upsample"), Paper(7040, 75.45, 82.05, 41.26)),
    "E-RADIO-L": Row(lambda: eradio("l"), Paper(3472, 77.87, 83.73, 45.5)),
    "E-RADIO, the released network": Row(lambda: eradio("released")),
    "E-RADIO-XT": Row(lambda: eradio("xt")),
    "E-RADIO-T": Row(lambda: eradio("t")),
    "E-RADIO-S": Row(lambda: eradio("s")),
    "E-RADIO phone (ours)": Row(lambda: eradio("phone")),
    "E-RADIO cpu (ours)": Row(lambda: eradio("cpu")),
    "EfficientNetV2-S": Row(lambda: FeaturesOf("tf_efficientnetv2_s"), Paper(9017, 65.37, 70.72, 27.75)),
    "ResNetv2-101": Row(lambda: FeaturesOf("resnetv2_101"), Paper(7283, 69.58, 75.32, 29.61)),
    "RegNetY-064": Row(lambda: FeaturesOf("regnety_064"), Paper(6573, 69.84, 74.59, 28.9)),
    "EfficientViT-L1": Row(lambda: FeaturesOf("efficientvit_l1"), Paper(6048, 71.73, 79.90, 33.12)),
    "ConvNeXt-B": Row(lambda: FeaturesOf("convnext_base"), Paper(1805, 75.43, 81.73, 38.95)),
    "NFNet-F3": Row(lambda: FeaturesOf("dm_nfnet_f3"), Paper(1777, 76.93, 80.50, 38.31)),
    "SwinV2-S": Row(
        lambda: FeaturesOf("swinv2_small_window8_256", img_size=SIDE, window_size=7),
        Paper(1497, 74.70, 81.12, 35.57),
        channels_last=False,
    ),
    "MaxViT-B": Row(lambda: FeaturesOf("maxvit_base_tf_224"), Paper(1486, 77.49, 79.34, 38.46)),
    "PoolformerV2-M36": Row(lambda: FeaturesOf("poolformerv2_m36"), Paper(1194, 74.46, 80.49, 35.05)),
    "MViTV2-B": Row(lambda: FeaturesOf("mvitv2_base"), Paper(975, 75.92, 81.39, 41.39), channels_last=False),
    "RADIO ViT-B/16": Row(lambda: radio("vit-b-16"), channels_last=False),
    "RADIO ViT-L/16": Row(lambda: radio("vit-l-16"), channels_last=False),
}


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class Timed:
    """What was measured of a row."""

    row: Row
    parameters: int
    flops: int  # of one image
    rates: dict[int, list[float]]  # images/s of each round, by batch size

    def rate(self, batch: int) -> float:
        return statistics.median(self.rates[batch])


@torch.inference_mode()
def measure(model: nn.Module, images: torch.Tensor) -> float:
    """Images/s."""
    runs, seconds, started = 0, 0.0, now(images.device)
    while seconds < SECONDS:
        model(images)
        runs, seconds = runs + 1, now(images.device) - started
    return runs * len(images) / seconds


def compare(names: list[str], rounds: int, batches: list[int], device: torch.device) -> dict[str, Timed]:
    timed: dict[str, Timed] = {}
    for index in range(rounds):
        for name in names:
            layout = torch.channels_last if ROWS[name].channels_last else torch.contiguous_format
            model = ROWS[name].build().eval().to(device, memory_format=layout)
            image = torch.rand(1, 3, SIDE, SIDE, device=device).to(memory_format=layout)
            if index == 0:
                parameters = sum(parameter.numel() for parameter in model.parameters())
                timed[name] = Timed(ROWS[name], parameters, count_flops(model, image), {size: [] for size in batches})
            with torch.inference_mode():
                model(image)  # what only the first pass makes
            for size in batches:
                rate = measure(model, image.repeat(size, 1, 1, 1).contiguous(memory_format=layout))
                timed[name].rates[size].append(rate)
                print(f"round {index + 1}, batch {size}: {rate:.2f} images/s, {name}", file=sys.stderr, flush=True)
    return timed


def print_table(built: dict[str, Timed], batches: list[int]) -> None:
    teachers = [name for name in (CLIP, DINO) if name in built]
    header = ["backbone", "parameters (M)", "GFLOPs"]
    for batch in batches:
        header += [f"images/s, batch {batch}", *(f"x {name} (paper)" for name in teachers)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, timed in built.items():
        cells = [name, f"{timed.parameters / 1e6:.2f}", f"{timed.flops / 1e9:.1f}"]
        for batch in batches:
            cells.append(f"{timed.rate(batch):.2f}")
            for teacher in teachers:
                published, of_teacher = timed.row.paper, built[teacher].row.paper
                ratio = f"{timed.rate(batch) / built[teacher].rate(batch):.2f}"
                if published and of_teacher:
                    ratio += f" ({published.images_per_second / of_teacher.images_per_second:.1f})"
                cells.append(ratio)
        print("| " + " | ".join(cells) + " |")


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (x, y) of which no other has at least the same x and y, by descending x."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: points[name], reverse=True):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def draw_panel(axes: Axes, points: dict[str, tuple[float, float]], label: str) -> None:
    """Images/s to the right, quality or size upwards, the front as a line."""
    front = pareto_front(points)
    style.style_axes(axes, "images/s", label)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.plot(*zip(*(points[name] for name in front), strict=True), color=style.GRAY, linewidth=1, zorder=1)
    for name, (x, y) in points.items():
        ours = name.startswith("E-RADIO")  # their names to the right, those of others to the left
        color = style.VERMILION if ours else style.GREEN if name in (CLIP, DINO) else style.BLUE
        axes.scatter([x], [y], s=18, color=color, zorder=2)
        below = any(abs(other / x - 1) < 0.1 and above > y for other, above in points.values())
        offset = (4 if ours else -4, -6 if below else 2)
        text = name.replace(" without upsampling", ", no neck").removesuffix(" (ours)").removesuffix(" ViT-H/14")
        axes.annotate(text, (x, y), offset, textcoords="offset points", size=5, ha="left" if ours else "right")


def draw(built: dict[str, Timed], batch: int, path: Path) -> None:
    figure = style.new_figure(2.4 * style.PANEL[0], 2.4 * style.PANEL[1])
    panels = figure.subplots(2, 2)
    rates = {name: timed.rate(batch) for name, timed in built.items()}
    draw_panel(
        panels.flat[0],
        {name: (rates[name], timed.parameters / 1e6) for name, timed in built.items()},
        "parameters (M)",
    )
    panels.flat[0].set_yscale("log")
    for axes, field, label in zip(
        panels.flat[1:],
        ("zero_shot", "knn", "miou"),
        ("zero-shot of the paper (%)", "k-NN of the paper (%)", "ADE20K mIoU of the paper"),
        strict=True,
    ):
        points = {name: (rates[name], getattr(timed.row.paper, field, None)) for name, timed in built.items()}
        points = {name: point for name, point in points.items() if point[1] is not None}
        if points:
            draw_panel(axes, points, label)
    style.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="draw the Pareto picture into this .png or .pdf")
    options = parser.parse_args()
    if options.picture and options.picture.suffix not in (".png", ".pdf"):  # before minutes of measuring
        parser.error(f"--picture is {options.picture}, expected a name that ends in .png or .pdf")
    device = torch.device(options.device)
    print(f"{SIDE} pixels, float32, {torch.get_num_threads()} threads, {device}, median of {options.rounds} rounds\n")
    built = compare(options.rows, options.rounds, options.batch_sizes, device)
    print_table(built, options.batch_sizes)
    if options.picture:
        draw(built, options.batch_sizes[0], options.picture)


if __name__ == "__main__":
    main()
