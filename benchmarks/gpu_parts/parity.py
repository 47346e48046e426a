"""The same numbers on the device as on a CPU in float64: model, heads, losses, gradients, steps of training.

An error is the largest difference over the largest magnitude of the reference, of the worst of all outputs; of a
gradient the norm of the difference over the norm of the reference, of the worst of all weights. For weights whose
gradient is next to nothing a thousandth of the whole gradient's norm is added to the reference's.
"""

import copy
from functools import cache, partial
from typing import Any

import torch
from measure import Case, Setup

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import TeacherOutput
from transformers_radio.training.balancing import build_balancing
from transformers_radio.training.distill import Distillation
from transformers_radio.training.losses import Term
from transformers_radio.training.recipe import LossRecipe

# dtype -> the largest error that rounding explains in twelve layers
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LOSS_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ADAPTORS = {  # a teacher with a summary on a finer grid than the student's, and one without on a coarser
    "clip": {"summary_dim": 64, "feature_dim": 96, "hidden_dim": 128, "summary_token": 0},
    "sam": {"summary_dim": None, "feature_dim": 80, "hidden_dim": 128},
}
GRIDS = {"clip": (16, 16), "sam": (8, 8)}
STEPS = 3


def cases(setup: Setup) -> list[Case]:
    forward = [
        (kind, dtype, attention)
        for attention, dtypes in {
            "sdpa": (torch.float32, torch.bfloat16, torch.float16),
            "eager": (torch.float32, torch.bfloat16),
            "flash_attention_2": (torch.bfloat16,),
        }.items()
        for dtype in dtypes
        for kind in ("whole", "windows", "packed")
    ]
    training = [(dtype, attention) for dtype in GRADIENT_TOLERANCES for attention in ("sdpa", "eager")]
    training += [(torch.bfloat16, "flash_attention_2")]
    return [
        *(Case(f"forward {k} {NAMES[d]} {a}", partial(forward_parity, k, d, a, setup)) for k, d, a in forward),
        *(Case(f"training {NAMES[d]} {a}", partial(training_parity, d, a, setup)) for d, a in training),
    ]


def forward_parity(kind: str, dtype: torch.dtype, attention: str, setup: Setup) -> dict[str, Any]:
    """Summary, features and heads of images as a batch, in windows, or packed."""
    model = student(setup, attention).to(setup.device, dtype).eval()
    found = outputs(model, kind, dtype, setup)
    error = max(relative_error(found[name], value) for name, value in reference(kind, setup).items())
    return verdict({"error": error}, {"error": TOLERANCES[dtype]})


@cache
def reference(kind: str, setup: Setup) -> dict[str, torch.Tensor]:
    return outputs(student(setup, "eager").double().eval(), kind, torch.float64, setup)


@torch.no_grad()
def outputs(model: RadioModel, kind: str, dtype: torch.dtype, setup: Setup) -> dict[str, torch.Tensor]:
    pixels = images(setup).to(model.device, dtype)
    if kind == "packed":
        # (B, C, h*p, w*p) -> (B, C, h, p, w, p) -> (B, h, w, C, p, p), of which images of three grids are cut
        patches = pixels.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).permute(0, 2, 4, 1, 3, 5)
        side = patches.shape[1]
        grids = [(side, side), (side, side // 2), (side // 2, side - 1)]
        cut = [patches[i % len(patches), :rows, :columns].flatten(0, 1) for i, (rows, columns) in enumerate(grids)]
        grid_hw = torch.tensor(grids, device=model.device)
        output = model(torch.cat(cut).flatten(1), image_grid_hw=grid_hw, window_size=0)
    else:
        output = model(pixels, window_size=pixels.shape[-1] // 32 if kind == "windows" else 0)
    heads = {f"{name}.{key}": value for name, head in output.adaptors.items() for key, value in vars(head).items()}
    heads = {name: value for name, value in heads.items() if isinstance(value, torch.Tensor)}
    return {"summary": output.summary, "features": output.features, **heads}


def training_parity(dtype: torch.dtype, attention: str, setup: Setup) -> dict[str, Any]:
    """Losses, gradients, and the losses of further steps of AdamW; in bfloat16 by autocast, as in training."""
    found, expected = training(dtype, attention, setup.device, setup), trained_reference(setup)
    errors = {
        "error": relative_error(found["losses"], expected["losses"]),
        "gradient error": gradient_error(found["gradient"], expected["gradient"]),
    }
    return verdict(errors, {"error": LOSS_TOLERANCES[dtype], "gradient error": GRADIENT_TOLERANCES[dtype]})


@cache
def trained_reference(setup: Setup) -> dict[str, Any]:
    return training(torch.float64, "eager", torch.device("cpu"), setup)


def training(dtype: torch.dtype, attention: str, device: torch.device, setup: Setup) -> dict[str, Any]:
    """losses: of each step and image. gradient: name -> that of a weight in the first step."""
    loss = LossRecipe()
    model = student(setup, attention).to(device).train()
    model = model.double() if dtype == torch.float64 else model
    terms = [Term("clip", "summary", 1.0), Term("clip", "features", 1.0), Term("sam", "features", 1.0)]
    balancing = build_balancing(loss.balancing, terms, model.summary_dim, model.feature_dim)
    distillation = Distillation(model, balancing, loss).to(device)
    optimizer = torch.optim.AdamW(distillation.parameters(), lr=1e-4, eps=1e-4, fused=True)
    pixels = images(setup)[:2].to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(2)
    targets = {}
    for name, grid in GRIDS.items():
        fields = ADAPTORS[name]
        batch = len(pixels)
        summary = torch.randn(batch, fields["summary_dim"] or 1, generator=generator).to(device)
        features = torch.randn(batch, grid[0] * grid[1], fields["feature_dim"], generator=generator).to(device)
        targets[name] = TeacherOutput(None if fields["summary_dim"] is None else summary, features, grid)
    losses, gradient = [], {}
    for step in range(STEPS):
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            totals, by_term = distillation(pixels, targets, window_size=0)
        totals.mean().backward()
        if step == 0:
            gradient = {name: p.grad.clone() for name, p in distillation.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses += [totals.detach(), *by_term.values()]
    return {"losses": torch.stack(losses), "gradient": gradient}


@cache
def _student(setup: Setup) -> RadioModel:
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window_num_global": 1}
    # larger weights than at a student's start, with which attention would be nearly uniform
    fields = {"initializer_range": 0.05, **(fields if setup.dry else {})}
    torch.manual_seed(1)
    config = RadioConfig.from_size(
        "vit-b-16",
        adaptors=ADAPTORS,
        num_cls_tokens=1,
        summary_idxs=[0],
        cpe_sampling=False,
        max_img_size=512,
        **fields,
    )
    return RadioModel(config)


def student(setup: Setup, attention: str) -> RadioModel:
    """Always the same weights, on the CPU in float32."""
    model = copy.deepcopy(_student(setup))
    model.set_attn_implementation(attention)
    return model


def images(setup: Setup) -> torch.Tensor:
    side = 64 if setup.dry else 256
    return torch.rand(2 if setup.dry else 4, 3, side, side, generator=torch.Generator().manual_seed(3))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN anywhere is an infinite error."""
    difference = (found.detach().cpu().double() - expected.detach().double()).abs().max() / expected.abs().max()
    return difference.nan_to_num(float("inf")).item()


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    expected = {name: value.double() for name, value in expected.items()}
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    errors = [
        (found[name].cpu().double() - value).norm() / (value.norm() + 1e-3 * norm) for name, value in expected.items()
    ]
    return torch.stack(errors).nan_to_num(float("inf")).max().item()


def verdict(errors: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    good = all(errors[name] <= limit for name, limit in limits.items())
    row = {key: value for name in errors for key, value in ((name, errors[name]), (f"{name} at most", limits[name]))}
    return {"status": "ok" if good else "FAIL", **row}
