"""`RadioModel` beside the encoders that people use today, of equal shape: milliseconds per batch on this machine.

    python benchmarks/encoders.py --main             # the main table, in about a quarter of an hour on 2 cores
    python benchmarks/encoders.py --sizes b l h --dtypes float32 bfloat16            # every forward pass: hours
    python benchmarks/encoders.py --sizes b l h --dtypes float32 bfloat16 --backward
    python benchmarks/encoders.py --windows          # windows against global attention at 512 to 2048

The others: transformers' own RADIO, timm's ViT, transformers' DINOv2 with registers. Weights are random, which changes
no time. All run in turn in one process, round after round, and each number is the median of its rounds; ratios hold on
a machine whose speed changes. On a CPU the clock counts processor time divided by the threads, so that other programs
do not count.
A row is kept in --output as soon as it is measured: the same command continues where it was stopped. bfloat16 is left
out where the processor has no units for it.
`share` is the rate at which the products of the model's own shape run alone, one after another, over the model's.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import timm
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from transformers_radio import RadioConfig, RadioModel
from transformers_radio.disk import write_json

SIZES = {"b": "vit-b-16", "l": "vit-l-16", "h": "vit-h-16"}
OURS, FUSED = "RadioModel", "RadioModel.fuse()"
REGISTERS = 4
# --main: size, side, batch sizes, dtypes
MAIN = [("b", 224, (1, 8), None), ("b", 432, (1, 8), None), ("l", 224, (1, 8), None), ("l", 432, (1,), None)]
MAIN += [("h", 224, (1,), ["float32"])]


def build(size: str, side: int, backward: bool) -> dict[str, nn.Module]:
    """Name -> encoder without heads, all with one CLS token and four registers."""
    ours = RadioConfig.from_size(SIZES[size], num_cls_tokens=1, num_registers=REGISTERS, max_img_size=side)
    shape = {
        "hidden_size": ours.hidden_size,
        "num_hidden_layers": ours.num_hidden_layers,
        "num_attention_heads": ours.num_attention_heads,
    }
    native = transformers.RadioConfig(
        **shape,
        intermediate_size=int(ours.hidden_size * ours.mlp_ratio),
        num_cls_tokens=1,
        summary_idxs=[0],
        num_registers=REGISTERS,
        patch_size=16,
        max_img_size=side,
    )
    vit = timm.models.VisionTransformer(
        img_size=side,
        embed_dim=ours.hidden_size,
        depth=ours.num_hidden_layers,
        num_heads=ours.num_attention_heads,
        reg_tokens=REGISTERS,
        num_classes=0,
        dynamic_img_size=True,
    )
    dino = Dinov2WithRegistersConfig(**shape, patch_size=16, image_size=side, num_register_tokens=REGISTERS)
    models: dict[str, nn.Module] = {
        OURS: RadioModel(ours),
        "transformers' RADIO": transformers.RadioModel(native),
        "timm's ViT": vit,
        "DINOv2 with registers": Dinov2WithRegistersModel(dino),
    }
    if not backward:
        models[FUSED] = RadioModel(ours).eval().fuse()
    return models


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    if isinstance(model, timm.models.VisionTransformer):
        return model.forward_features(images)
    output = model(images)
    return output.features if hasattr(output, "features") else output.last_hidden_state


def measure(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, seconds: float = 0.3
) -> dict[str, float]:
    """Name -> milliseconds, the median of rounds in turn, each of them at least so long."""

    def now() -> float:
        if device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        torch.accelerator.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            count, started = 0, now()
            while not count or now() - started < seconds:
                run()
                count += 1
            if number:  # the first round warms up
                times[name].append(1e3 * (now() - started) / count)
    return {name: statistics.median(of_rounds) for name, of_rounds in times.items()}


def forward_of(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return features(model, images)

    return run


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        features(model, images).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def peak(model: RadioModel, images: torch.Tensor) -> Callable[[], object]:
    """The model's products alone: FLOPs of the forward pass in Linear layers of one block, run again and again."""
    tokens = images.shape[0] * (REGISTERS + 1 + (images.shape[2] // 16) * (images.shape[3] // 16))
    width = model.config.hidden_size
    rows = torch.randn(tokens, width, dtype=images.dtype, device=images.device)
    weight = torch.randn(4 * width, width, dtype=images.dtype, device=images.device)

    @torch.inference_mode()
    def run() -> object:
        return nn.functional.linear(rows, weight)

    return run


def share_of_peak(model: RadioModel, images: torch.Tensor, milliseconds: float, rounds: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(images)
    run = peak(model, images)
    with FlopCounterMode(display=False) as one:
        run()
    alone = measure({"peak": run}, rounds, images.device)["peak"]
    return (counter.get_total_flops() / milliseconds) / (one.get_total_flops() / alone)


class Rows:
    """Rows that were measured, by what they were measured of, in a JSON file."""

    def __init__(self, path: Path, device: str):
        self.path = path
        self.rows: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        where = (device, processor(), torch.get_num_threads(), torch.__version__, transformers.__version__)
        self.where = " ".join(map(str, where))

    def get(self, name: str, measured: Callable[[], list[float]]) -> list[float]:
        key = f"{name} on {self.where}"
        if key not in self.rows:
            self.rows[key] = measured()
            write_json(self.path, self.rows)
        return self.rows[key]


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compare(options: argparse.Namespace, rows: Rows, size: str, side: int, batch: int, name: str) -> None:
    """Prints one row: milliseconds of each encoder, ours over the fastest other, share of the peak."""
    device, dtype = torch.device(options.device), getattr(torch, name)

    def measured() -> list[float]:
        models = {key: model.to(device, dtype) for key, model in build(size, side, options.backward).items()}
        for model in models.values():
            model.train(options.backward)
        images = torch.rand(batch, 3, side, side, device=device, dtype=dtype)
        make = step_of if options.backward else forward_of
        times = measure({key: make(model, images) for key, model in models.items()}, options.rounds, device)
        best, nothing = times.get(FUSED, times[OURS]), float("nan")
        share = nothing if options.backward else share_of_peak(models[OURS], images, best, options.rounds)
        return [*(times.get(key, nothing) for key in (OURS, FUSED, *list(models)[1:4])), share]

    what = "forward+backward" if options.backward else "forward"
    *times, share = rows.get(f"{what} {size} {side} {batch} {name}", measured)
    ours, fused, *others = times
    cells = " | ".join("–" if time != time else f"{time:.1f}" for time in times)
    ratios = " | ".join("–" if time != time else f"{time / min(others):.2f}" for time in (ours, fused))
    last = "–" if share != share else f"{share:.0%}"
    print(f"| {size.upper()} | {side} | {batch} | {name} | {cells} | {ratios} | {last} |", flush=True)


def compare_windows(options: argparse.Namespace, rows: Rows) -> None:
    """B at growing sides: windows of 16 x 16 patches in all blocks but four, against global attention."""
    device = torch.device(options.device)
    model = RadioModel(RadioConfig.from_size("vit-b-16", num_cls_tokens=1, window_num_global=4)).eval().to(device)
    print("| Side | global, ms | windows of 16, ms | gain |\n|---:|---:|---:|---:|")
    for side in options.sides or [512, 1024, 1536, 2048]:
        images = torch.rand(1, 3, side, side, device=device)

        @torch.inference_mode()
        def run(window_size: int | None, images: torch.Tensor = images) -> object:
            return model(images, window_size=window_size)

        def measured(run: Callable[[int | None], object] = run) -> list[float]:
            runs = {"global": lambda: run(None), "windows": lambda: run(16)}
            return list(measure(runs, options.rounds, device).values())

        everywhere, windows = rows.get(f"windows {side}", measured)
        print(f"| {side} | {everywhere:.0f} | {windows:.0f} | {everywhere / windows:.2f} |", flush=True)


def rows_to_measure(options: argparse.Namespace) -> list[tuple[str, int, int, str]]:
    """(size, side, batch, dtype) of each row."""
    dtypes = options.dtypes or (["float32", "bfloat16"] if options.main else ["float32"])
    if options.device == "cpu" and "bfloat16" in dtypes and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("bfloat16 is left out: this processor has no units for it, and would need minutes per image\n")
        dtypes = [name for name in dtypes if name != "bfloat16"]
    if options.main:
        return [
            (size, side, batch, name)
            for size, side, batches, only in MAIN
            for name in (only or dtypes)
            for batch in batches
        ]
    sides = options.sides or [224, 432, 1024]
    return list(itertools.product(options.sizes, sides, options.batch_sizes, dtypes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b"], choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, help="in pixels; 224, 432 and 1024 unless given")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--windows", action="store_true", help="windows against global attention instead")
    parser.add_argument("--main", action="store_true", help="B and L at 224 and 432, H at 224; three rounds each")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/encoders.json"), help="where rows are kept")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.main else 5)
    rows = Rows(options.output, options.device)
    print(
        f"{processor()}, {torch.get_num_threads()} threads, {options.device}, median of {options.rounds} rounds, ms\n"
    )
    if options.windows:
        return compare_windows(options, rows)
    names = (OURS, FUSED, "transformers' RADIO", "timm's ViT", "DINOv2 with registers")
    header = [
        "Size",
        "Side",
        "Batch",
        "dtype",
        *names,
        "ours / fastest other",
        "fused / fastest other",
        "share of peak",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows_to_measure(options):
        compare(options, rows, *row)
    return None


if __name__ == "__main__":
    main()
