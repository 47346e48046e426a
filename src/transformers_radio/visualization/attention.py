"""Where a student's summary tokens look: their attention to the patches, in any block with global attention."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from transformers_radio.modeling import RadioModel

from .panels import Column, heat, photographs, write_panels

BRIGHTEST = 0.99  # quantile of a panel: one artifact patch must not darken all others


@torch.no_grad()
def summary_attention(model: RadioModel, images: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Attention from each class token to each patch: float32 (B, class tokens, heads, h, w).

    They are probabilities, as the model itself returns them with `output_attentions`. Over the patches they sum to
    less than 1, as class and register tokens get attention too. They need eager attention, which the model uses here
    before it returns to its own implementation. Images are computed one at a time: all blocks' probabilities of an
    image are in memory at once, layers * heads * tokens^2 * 4 bytes (1.1 GB for ViT-H/16 at 432 px).

    Args:
        model: a student in eval mode.
        images: float (B, 3, H, W) in [0, 1].
        layer: block, from 0; negative ones count from the last.

    Raises:
        ValueError: no class token takes part in the summary, no such block, or a block with windows, in which class
            tokens do not see the image.
    """
    config = model.config
    if getattr(config, "summary_type", "mean") != "cls":
        raise ValueError("This student's summary is the mean of its features: it has no token that attends.")
    depth = config.num_hidden_layers
    if not -depth <= layer < depth:
        raise ValueError(f"layer is {layer}; expected {-depth} to {depth - 1}, as the student has {depth} blocks.")
    layer %= depth
    if config.window_size and layer not in config.global_blocks:
        raise ValueError(
            f"Block {layer} attends within windows of {config.window_size} patches, outside of which its class tokens "
            f"see nothing: choose a layer among {config.global_blocks}."
        )
    implementation = config._attn_implementation
    model.set_attn_implementation("eager")
    maps = []
    try:
        for image in tqdm(images.to(model.dtype), desc="attention", unit="image"):
            output = model(image[None], adaptors=[], output_attentions=True)
            attention = output.attentions[layer][0]  # (heads, L, L)
            to_patches = attention[:, : config.num_cls_tokens, config.num_summary_tokens :].float()
            # (heads, cls, h*w) -> (cls, heads, h*w) -> (cls, heads, h, w)
            maps.append(to_patches.transpose(0, 1).unflatten(2, output.grid))
    finally:
        model.set_attn_implementation(implementation)
    return torch.stack(maps)


def attention_figure(
    images: torch.Tensor, attention: torch.Tensor, path: str | Path, titles: Sequence[str], subtitle: str
) -> Path:
    """Writes a PNG: a row per image; the input, then its attention maps patch by patch.

    Each map is scaled to its own brightest patches.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1].
        attention: (N, maps, h, w).
        titles: of the maps.
        subtitle: below each title, such as "block 12 of 12"; a second line has the share of the attention that is on
            patches, and their grid.
    """
    shown = [photographs(list(images))]
    for number, title in enumerate(titles):
        maps = attention[:, number].float().cpu()
        panels = [
            heat(one, 0.0, one.quantile(BRIGHTEST).item(), image) for one, image in zip(maps, images, strict=True)
        ]
        share = maps.sum(dim=(1, 2)).mean().item()
        grid = f"{maps.shape[2]} × {maps.shape[1]} patches"
        shown.append(Column(title, f"{subtitle}\n{share:.0%} on {grid}", panels, smooth=True))
    return write_panels(shown, path)
