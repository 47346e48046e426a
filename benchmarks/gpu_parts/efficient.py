"""Efficient backbones at 224 pixels, over the shapes of two teachers: the paper's Table 6 on this card.

The paper measures with TensorRT on an A100 at batch 128, in FP16 and FP32 mixed. Its claims are E-RADIO-L's and -B's
images/s over those of OpenCLIP ViT-H/14 (6.2 and 11.5 times) and DINOv2 ViT-g/14 (11.1 and 20.5 times).
"""

from functools import cache, partial
from typing import Any

import torch
from measure import Case, Setup, compiler, forward_flops, free, graphed, peak_memory, seconds, share
from torch import nn

SIDE, BATCH = 224, 128
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CLIP_H, DINOV2_G = "OpenCLIP ViT-H/14", "DINOv2 ViT-g/14"
Timm = tuple[str, dict[str, Any]]
# Row of Table 6 -> timm's model and its options, the paper's images/s
MODELS: dict[str, tuple[Timm, int]] = {
    CLIP_H: (("vit_huge_patch14_clip_224", {"num_classes": 1024}), 556),
    DINOV2_G: (("vit_giant_patch14_dinov2", {"num_classes": 0, "img_size": SIDE}), 313),
    "EfficientNetV2-S": (("tf_efficientnetv2_s", {}), 9017),
    "ResNetv2-101": (("resnetv2_101", {}), 7283),
    "RegNetY-064": (("regnety_064", {}), 6573),
    "EfficientViT-L1": (("efficientvit_l1", {}), 6048),
    "ConvNext-B": (("convnext_base", {}), 1805),
    "NFNet-F3": (("nfnet_f3", {}), 1777),
    "SwinV2-S": (("swinv2_small_window8_256", {"img_size": SIDE, "window_size": 7}), 1497),
    "MaxViT-B": (("maxvit_base_tf_224", {}), 1486),
    "PoolformerV2-M36": (("poolformerv2_m36", {}), 1194),
    "MViTV2-B": (("mvitv2_base", {}), 975),
}
# our size, and the paper's images/s
ERADIO = {"E-RADIO-B": ("b", 6422), "E-RADIO-B w/o upsample": ("b-no-upsample", 7040), "E-RADIO-L": ("l", 3472)}
PAPER = {name: rate for table in (MODELS, ERADIO) for name, (_, rate) in table.items()}
TINY: dict[str, Timm] = {CLIP_H: ("test_vit", {}), DINOV2_G: ("test_vit", {}), "ResNetv2-101": ("test_resnet", {})}
TINY_ERADIO = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2], "stem_channels": 8}


def cases(setup: Setup) -> list[Case]:
    names = [*(TINY if setup.dry else MODELS), *ERADIO]
    ways = [("fp16", "graph"), ("fp16", "compiled"), ("bf16", "graph"), ("bf16", "compiled")]
    ways = ways[::3] if setup.dry else ways
    return [
        *(Case(f"{name} {dtype} {mode}", partial(measure, name, dtype, mode, setup), limit=150)
          for dtype, mode in ways for name in names),
    ]  # fmt: skip


def measure(name: str, dtype: str, mode: str, setup: Setup) -> dict[str, Any]:
    """A row with images/s over those of both teachers run the same way, beside the paper's."""
    row = speed(name, dtype, mode, setup)
    paper = PAPER[name]
    for teacher in (CLIP_H, DINOV2_G):
        column = f"x {teacher.split()[0]}"
        row[column] = row["images/s"] / speed(teacher, dtype, mode, setup)["images/s"]
        row[f"{column}, paper"] = paper / PAPER[teacher]
    return {**row, "images/s, paper": paper}


@cache
@torch.no_grad()
def _measured(name: str, dtype: str, mode: str, setup: Setup) -> tuple[tuple[str, float], ...]:
    layout = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    with torch.device(setup.device):
        model = build(name, setup.dry).to(**layout).eval()
    batch, side = (2, 160) if setup.dry else (BATCH, SIDE)
    images = torch.rand(batch, 3, side, side, device=setup.device).to(**layout)
    flops = batch * forward_flops(lambda: model(images[:1]))
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    torch.compiler.reset()
    if mode == "compiled":
        model.compile(backend=compiler(setup), dynamic=False)
    with peak_memory(setup.device) as peak:
        took = seconds(graphed(partial(model, images), setup), setup)
    row = {"M params": weights, "ms": 1e3 * took, "images/s": batch / took, "% of peak": share(flops, took, setup)}
    return tuple({**row, **peak}.items())


def speed(name: str, dtype: str, mode: str, setup: Setup) -> dict[str, float]:
    measured = dict(_measured(name, dtype, mode, setup))
    free(setup.device)
    return measured


def build(name: str, dry: bool) -> nn.Module:
    """A row's model with random weights, on the current default device; E-RADIO's batch norms are fused."""
    import timm

    from transformers_radio import ERadioConfig, ERadioModel

    if name in ERADIO:
        config = ERadioConfig.from_size(ERADIO[name][0], **(TINY_ERADIO if dry else {}))
        return ERadioModel(config).eval().fuse()
    model, options = TINY[name] if dry else MODELS[name][0]
    return timm.create_model(model, **options)
