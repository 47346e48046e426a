"""`RadioModel` beside the encoders that people use today, of equal shape: milliseconds per batch on this machine.

    python benchmarks/encoders.py --main      # the table of docs/models.md, in 30 to 55 minutes on 2 idle cores
    python benchmarks/encoders.py --sizes b l h --dtypes float32 bfloat16            # every forward pass: hours
    python benchmarks/encoders.py --sizes b l h --dtypes float32 bfloat16 --backward
    python benchmarks/encoders.py --windows   # windows against global attention at 512 to 2048

The others: transformers' own RADIO, timm's ViT, transformers' DINOv2 with registers. Weights are random, which changes
no time. All run in turn in one process, round after round: milliseconds are medians, and a ratio is the median of the
ratios within rounds, in which the machine is equally busy. Slow rows get fewer rounds, and one with an encoder that
takes longer than --limit for one pass is left out. On a CPU the clock counts processor time divided by the threads.
A row is kept in --output as soon as it is measured: the same command continues where it was stopped. bfloat16 is left
out where the processor has no units for it.
`share of peak`: FLOPs of the pass in the time of the faster `RadioModel`, over those of a product of two square
matrices, which runs in turn with the encoders: as torch computes it, or with one matrix reordered by oneDNN before,
whichever is faster. FLOPs are those of products, convolutions and attention.
Below the table: how long ours take relative to each other encoder, geometric means over its rows with their standard
errors. Of encoders that are equally fast, the fastest in a row is the luckiest, so single ratios to it tend to lie
above 1.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import timm
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from transformers_radio import RadioConfig, RadioModel
from transformers_radio.disk import write_json
from transformers_radio.training.plan.dry_run import FUSED_ATTENTION

SIZES = {"b": "vit-b-16", "l": "vit-l-16", "h": "vit-h-16"}
OURS, FUSED = "RadioModel", "RadioModel.fuse()"
OWN = (OURS, FUSED)
OTHERS = ("transformers' RADIO", "timm's ViT", "DINOv2 with registers")
PEAKS = ("product", "product of a packed matrix")
PEAK_SIDE = 2048
FEWEST_ROUNDS, MOST_ROUNDS = 8, 40
REGISTERS = 4
# --main: what, size, side, batch sizes; in float32 and bfloat16
FORWARD, BACKWARD = "forward", "forward+backward"
MAIN = [
    (FORWARD, "b", 224, (1, 8)),
    (FORWARD, "b", 432, (1, 8)),
    (FORWARD, "b", 1024, (1,)),
    (FORWARD, "l", 224, (1, 8)),
    (FORWARD, "h", 224, (1,)),
    (BACKWARD, "b", 224, (1, 8)),
]


class TooSlow(Exception):
    """One pass of an encoder took `seconds`, more than the limit."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


def build(size: str, side: int, backward: bool, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
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
    vit = {
        "img_size": side,
        "embed_dim": ours.hidden_size,
        "depth": ours.num_hidden_layers,
        "num_heads": ours.num_attention_heads,
        "reg_tokens": REGISTERS,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    dino = Dinov2WithRegistersConfig(**shape, patch_size=16, image_size=side, num_register_tokens=REGISTERS)
    makers: dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: RadioModel(ours),
        "transformers' RADIO": lambda: transformers.RadioModel(native),
        "timm's ViT": lambda: timm.models.VisionTransformer(**vit),
        "DINOv2 with registers": lambda: Dinov2WithRegistersModel(dino),
    }
    # cast one by one: five of the size H in float32 take 13 GB
    models = {name: make().to(device, dtype).train(backward) for name, make in makers.items()}
    if not backward:
        models[FUSED] = RadioModel(ours).to(device, dtype).eval().fuse()
    return models


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    if isinstance(model, timm.models.VisionTransformer):
        return model.forward_features(images)
    output = model(images)
    return output.features if hasattr(output, "features") else output.last_hidden_state


def measure(
    runs: dict[str, Callable[[], object]], options: argparse.Namespace, seconds: float = 0.1
) -> dict[str, list[float]]:
    """Name -> milliseconds in each of the rounds, in which the `runs` take turns, each for at least `seconds`.

    Raises:
        TooSlow: one pass takes longer than `options.limit`.
    """
    device = torch.device(options.device)

    def now() -> float:
        if device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        torch.accelerator.synchronize()
        return time.perf_counter()

    def one(run: Callable[[], object], least: float) -> float:
        count, started = 0, now()
        while not count or now() - started < least:
            run()
            count += 1
        return (now() - started) / count

    first = {}
    for name, run in runs.items():  # which also warms up
        first[name] = one(run, 0)
        if first[name] > options.limit:
            raise TooSlow(first[name])
    long = sum(max(time, seconds) for time in first.values())
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds or min(max(int(options.seconds / long), FEWEST_ROUNDS), MOST_ROUNDS)):
        random.shuffle(order)  # none runs always behind the same one, which leaves caches and a clock rate behind
        for name in order:
            times[name].append(1e3 * one(runs[name], seconds))
    return times


def ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as long as `other` it takes: the median over rounds."""
    return statistics.median(one / two for one, two in zip(times[name], times[other], strict=True))


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


def peaks_of(images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Products of square matrices, in the dtype and on the device of the images."""
    one, other = torch.randn(2, PEAK_SIDE, PEAK_SIDE, dtype=images.dtype, device=images.device)

    @torch.inference_mode()
    def plain() -> object:
        return one @ other

    if images.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {PEAKS[0]: plain}
    packed = torch.ops.mkldnn._reorder_linear_weight(other)

    @torch.inference_mode()
    def reordered() -> object:
        return torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")

    return dict(zip(PEAKS, (plain, reordered), strict=True))


def flops_of(model: nn.Module, images: torch.Tensor, backward: bool) -> int:
    # not in inference mode, in which the counter sees no attention
    run = step_of(model, images) if backward else lambda: features(model, images)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter, torch.set_grad_enabled(backward):
        run()
    return counter.get_total_flops()


class Rows:
    """Rows that were measured, by what they were measured of, in a JSON file."""

    def __init__(self, path: Path, device: str):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
        self.left_out: list[str] = []
        where = (device, processor(), torch.get_num_threads(), torch.__version__, transformers.__version__)
        self.where = " ".join(map(str, where))

    def get(self, name: str, limit: float, measured: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What was kept or is measured now; None, and a line in `left_out`, for a row with a pass above the limit."""
        key = f"rounds of {name} on {self.where}"
        row = self.rows.get(key)
        if row is None or row.get("too slow", limit) < limit:
            try:
                row = measured()
            except TooSlow as error:
                row = {"too slow": error.seconds}
            self.rows[key] = row
            write_json(self.path, self.rows)
        if "too slow" in row:
            self.left_out.append(f"Left out: {name}, where one pass takes {row['too slow']:.0f} s.")
            return None
        return row


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compare(
    options: argparse.Namespace, rows: Rows, what: str, size: str, side: int, batch: int, name: str
) -> dict[str, list[float]] | None:
    """Prints one row: milliseconds of each encoder, ours over the fastest other, share of the peak.

    Returns:
        Name -> milliseconds in each round; None for a row that is left out.
    """
    device, dtype, backward = torch.device(options.device), getattr(torch, name), what == BACKWARD

    def measured() -> dict[str, Any]:
        models = build(size, side, backward, dtype, device)
        images = torch.rand(batch, 3, side, side, device=device, dtype=dtype)
        make = step_of if backward else forward_of
        runs = {**peaks_of(images), **{key: make(model, images) for key, model in models.items()}}
        times = measure(runs, options)
        return {"times": times, "GFLOPs": flops_of(models[OURS], images, backward) / 1e9}

    row = rows.get(f"{what} {size} {side} {batch} {name}", options.limit, measured)
    if row is None:
        return None
    times = row["times"]
    cells = [f"{statistics.median(times[key]):.1f}" if key in times else "–" for key in (OURS, FUSED, *OTHERS)]
    # the ratio to the fastest of them is the largest
    cells += [f"{max(ratio(times, key, other) for other in OTHERS):.2f}" if key in times else "–" for key in OWN]
    peak = 2e-9 * PEAK_SIDE**3  # billions
    over_peak = {
        key: max(ratio(times, key, product) for product in PEAKS if product in times) for key in OWN if key in times
    }
    share = row["GFLOPs"] / peak / min(over_peak.values())
    rounds = len(times[OURS])
    print(
        f"| {what} | {size.upper()} | {side} | {batch} | {name} | {' | '.join(cells)} | {share:.0%} | {rounds} |",
        flush=True,
    )
    return times


def print_means(measured: list[tuple[str, dict[str, list[float]]]]) -> None:
    """Geometric means over rows of our time over that of each other encoder; `measured`: (pass, times) of each row."""
    print(f"\n| Pass | over the time of | {OURS} | fused |\n|---|---|---:|---:|")
    for what, other in itertools.product((FORWARD, BACKWARD), OTHERS):
        cells = []
        for key in OWN:
            logs = [math.log(ratio(times, key, other)) for kind, times in measured if kind == what and key in times]
            error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0
            cells.append(f"{math.exp(statistics.mean(logs)):.3f} ± {error:.3f}" if error else "–")
        if cells != ["–", "–"]:
            print(f"| {what} | {other} | {' | '.join(cells)} |")


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

        def measured(run: Callable[[int | None], object] = run) -> dict[str, Any]:
            return {"times": measure({"global": lambda: run(None), "windows": lambda: run(16)}, options)}

        row = rows.get(f"windows {side}", options.limit, measured)
        if row is not None:
            everywhere, windows = (statistics.median(row["times"][name]) for name in ("global", "windows"))
            gain = ratio(row["times"], "global", "windows")
            print(f"| {side} | {everywhere:.0f} | {windows:.0f} | {gain:.2f} |", flush=True)


def rows_to_measure(options: argparse.Namespace) -> list[tuple[str, str, int, int, str]]:
    """(what, size, side, batch, dtype) of each row."""
    dtypes = options.dtypes or (["float32", "bfloat16"] if options.main else ["float32"])
    if options.device == "cpu" and "bfloat16" in dtypes and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("bfloat16 is left out: this processor has no units for it, and would need minutes per image\n")
        dtypes = [name for name in dtypes if name != "bfloat16"]
    if options.main:
        return [
            (what, size, side, batch, name)
            for what, size, side, batches in MAIN
            for name in dtypes
            for batch in batches
        ]
    what = BACKWARD if options.backward else FORWARD
    sides = options.sides or [224, 432, 1024]
    return list(itertools.product([what], options.sizes, sides, options.batch_sizes, dtypes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b"], choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, help="in pixels; 224, 432 and 1024 unless given")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--windows", action="store_true", help="windows against global attention instead")
    parser.add_argument("--main", action="store_true", help="B at 224, 432 and 1024, L and H at 224, B backward")
    parser.add_argument(
        "--rounds", type=int, help=f"in each row; unless given, {FEWEST_ROUNDS} to {MOST_ROUNDS} by --seconds"
    )
    parser.add_argument("--seconds", type=float, default=60, help="about so long for the rounds of one row")
    parser.add_argument("--limit", type=float, default=25, help="leave rows out in which one pass takes more seconds")
    parser.add_argument("--output", type=Path, default=Path("runs/encoders.json"), help="where rows are kept")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = Rows(options.output, options.device)
    rounds = options.rounds or f"{FEWEST_ROUNDS} to {MOST_ROUNDS}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {options.device}, medians of {rounds} rounds, ms\n")
    if options.windows:
        compare_windows(options, rows)
    else:
        header = ["Pass", "Size", "Side", "Batch", "dtype", OURS, FUSED, *OTHERS]
        header += ["ours / fastest other", "fused / fastest other", "share of peak", "rounds"]
        wanted = rows_to_measure(options)
        print("| " + " | ".join(header) + " |\n|" + "---|" * 5 + "---:|" * (len(header) - 5))
        measured = [(row[0], compare(options, rows, *row)) for row in wanted]
        print_means([(what, times) for what, times in measured if times is not None])
    print("".join(f"\n{line}" for line in rows.left_out))


if __name__ == "__main__":
    main()
