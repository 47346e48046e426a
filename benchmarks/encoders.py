"""`RadioModel` beside the encoders that people use today, of equal shape: milliseconds per batch on this machine.

    python benchmarks/encoders.py [--sizes b l h] [--sides 224 432 1024] [--batch-sizes 1 8]
                                  [--dtypes float32 bfloat16] [--backward] [--windows] [--rounds 5] [--device cpu]

The others: transformers' own RADIO, timm's ViT, transformers' DINOv2 with registers. Weights are random, which changes
no time. All run in turn in one process, round after round, and each number is the median of its rounds; ratios hold on
a machine whose speed changes. On a CPU the clock counts processor time divided by the threads, so that other programs
do not count.
`share` is the rate at which the products of the model's own shape run alone, one after another, over the model's.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import timm
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from transformers_radio import RadioConfig, RadioModel

SIZES = {"b": "vit-b-16", "l": "vit-l-16", "h": "vit-h-16"}
OURS, FUSED = "RadioModel", "RadioModel.fuse()"
REGISTERS = 4


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


def compare(options: argparse.Namespace, size: str, side: int, dtype: torch.dtype) -> None:
    device = torch.device(options.device)
    models = {name: model.to(device, dtype) for name, model in build(size, side, options.backward).items()}
    for model in models.values():
        model.train(options.backward)
    for batch in options.batch_sizes:
        images = torch.rand(batch, 3, side, side, device=device, dtype=dtype)
        make = step_of if options.backward else forward_of
        times = measure({name: make(model, images) for name, model in models.items()}, options.rounds, device)
        others = min(value for name, value in times.items() if name not in (OURS, FUSED))
        best = times.get(FUSED, times[OURS])
        share = share_of_peak(models[OURS], images, best, options.rounds) if not options.backward else float("nan")
        cells = [f"{times.get(name, float('nan')):.1f}" for name in (OURS, FUSED, *list(models)[1:4])]
        ratios = f"{times[OURS] / others:.2f} | {best / others:.2f} | {share:.0%}"
        name = str(dtype).removeprefix("torch.")
        print(f"| {size.upper()} | {side} | {batch} | {name} | {' | '.join(cells)} | {ratios} |", flush=True)


def compare_windows(options: argparse.Namespace) -> None:
    """B at growing sides: windows of 16 x 16 patches in all blocks but four, against global attention."""
    device = torch.device(options.device)
    model = RadioModel(RadioConfig.from_size("vit-b-16", num_cls_tokens=1, window_num_global=4)).eval().to(device)
    print("| Side | global, ms | windows of 16, ms | gain |\n|---:|---:|---:|---:|")
    for side in options.sides:
        images = torch.rand(1, 3, side, side, device=device)

        @torch.inference_mode()
        def run(window_size: int | None, images: torch.Tensor = images) -> object:
            return model(images, window_size=window_size)

        times = measure({"global": lambda: run(None), "windows": lambda: run(16)}, options.rounds, device)
        gain = times["global"] / times["windows"]
        print(f"| {side} | {times['global']:.0f} | {times['windows']:.0f} | {gain:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b"], choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, default=[224, 432, 1024])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--windows", action="store_true", help="windows against global attention instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.device}, median of {options.rounds} rounds, ms per batch\n")
    if options.windows:
        return compare_windows(options)
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
    for size, side, dtype in itertools.product(options.sizes, options.sides, options.dtypes):
        compare(options, size, side, getattr(torch, dtype))
    return None


if __name__ == "__main__":
    main()
