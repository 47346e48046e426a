"""Forward passes of vision transformers in bfloat16: ours, transformers' own, timm's and DINOv2 with registers."""

from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from measure import Case, Setup, compiled_blocks, forward_flops, graphed, peak_memory, seconds, share
from torch import nn

SIZES = {"B": "vit-b-16", "L": "vit-l-16", "H": "vit-h-16"}
SIDES = (432, 224, 1024)
BATCHES = (32, 1, 128)
OTHERS = ("native", "timm", "dinov2-registers")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4.0}
TINY_NUMBERS = {224: 32, 432: 48, 1024: 64, 1: 1, 32: 2, 128: 3, 16: 2}  # sides, batches, windows of a dry run


def cases(setup: Setup) -> list[Case]:
    """The most telling first: a short run is cut off at the end."""
    wanted: list[tuple[Any, ...]] = []  # kind, size, side, batch, mode, window
    for size in "HLB":
        wanted += [("ours", size, side, 32, "eager", 0) for side in SIDES]
    for size in "HLB":
        wanted += [("ours", size, 432, 32, "compiled", 0), ("ours", size, 432, 1, "eager", 0)]
        wanted += [("ours", size, 432, 1, "graph", 0)]
    for size in "HLB":
        wanted += [(kind, size, 432, 32, "eager", 0) for kind in OTHERS]
    wanted += [("ours", size, 1024, 32, "eager", window) for size in "HLB" for window in (16, 8)]
    for size in "HLB":
        for kind in OTHERS:
            wanted += [(kind, size, side, 32, "eager", 0) for side in (224, 1024)]
            wanted += [(kind, size, 432, 32, "compiled", 0), (kind, size, 432, 1, "graph", 0)]
    for size in "BLH":
        for kind in ("ours", *OTHERS):
            rest = [
                (side, batch, mode) for side in SIDES for batch in BATCHES for mode in ("eager", "compiled", "graph")
            ]
            wanted += [(kind, size, *one, 0) for one in rest if one[2] != "graph" or one[1] == 1]
    if setup.dry:
        wanted = [("ours", "B", 432, 32, mode, 0) for mode in ("eager", "compiled", "graph")]
        wanted += [(kind, "B", 224, 1, "eager", 0) for kind in OTHERS] + [("ours", "B", 1024, 128, "eager", 16)]
    wanted = list(dict.fromkeys(wanted))
    return [Case(title(*one), partial(measure, *one, setup), limit=120) for one in wanted]


def title(kind: str, size: str, side: int, batch: int, mode: str, window: int) -> str:
    return f"{kind} ViT-{size} {side} x{batch} {mode}" + (f" windows {window}" if window else "")


@torch.no_grad()  # not inference_mode, in which the counter of FLOPs sees no products
def measure(kind: str, size: str, side: int, batch: int, mode: str, window: int, setup: Setup) -> dict[str, float]:
    if setup.dry:
        side, batch, window = (TINY_NUMBERS.get(number, 0) for number in (side, batch, window))
    model = build(kind, size, side if kind not in ("ours", "native") else 0, setup)
    images = torch.rand(batch, 3, side, side, device=setup.device).to(torch.bfloat16)
    options = {"window_size": window} if window else {}
    flops = batch * forward_flops(lambda: model(images[:1], **options))
    with peak_memory(setup.device) as peak, compiled_blocks(model, setup) if mode == "compiled" else nullcontext():
        run = partial(model, images, **options)
        took = seconds(graphed(run, setup) if mode == "graph" else run, setup)
    return {
        "ms": 1e3 * took,
        "images/s": batch / took,
        "% of peak": share(flops, took, setup),
        "GFLOPs/image": flops / batch / 1e9,
        **peak,
    }


@lru_cache(maxsize=1)  # the next model takes the place of the last
def build(kind: str, size: str, side: int, setup: Setup) -> nn.Module:
    """A model of a student's size with random weights. All have patches of 16 pixels, so that FLOPs can be compared.

    Args:
        side: of the images, for models that are made for one.
    """
    from transformers_radio.modeling import RadioConfig

    fields: dict[str, Any] = {**RadioConfig.sizes()[SIZES[size]], **(TINY if setup.dry else {})}
    with torch.device(setup.device):
        model = _BUILDERS[kind](fields, side)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def _ours(fields: dict[str, Any], side: int) -> nn.Module:
    from transformers_radio.modeling import RadioConfig, RadioModel

    # so that a model of two layers has one with windows; four as by default in the real sizes
    return RadioModel(RadioConfig(**fields, window_num_global=min(fields["num_hidden_layers"] // 2, 4)))


def _native(fields: dict[str, Any], side: int) -> nn.Module:
    from transformers import RadioConfig, RadioModel

    return RadioModel(RadioConfig(**fields))


def _timm(fields: dict[str, Any], side: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=side,
        patch_size=fields["patch_size"],
        embed_dim=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_ratio=fields["mlp_ratio"],
        num_classes=0,
    )


def _dinov2(fields: dict[str, Any], side: int) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    fields = {**fields, "mlp_ratio": round(fields["mlp_ratio"])}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**fields, image_size=side, num_register_tokens=4))


_BUILDERS = {"ours": _ours, "native": _native, "timm": _timm, "dinov2-registers": _dinov2}
