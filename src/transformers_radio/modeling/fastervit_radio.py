"""FasterViT (paper Sec. 5.1): a package registers it with timm, without what timm's networks say of themselves."""

from functools import partial
from typing import Any

import torch

_PREFIX = "faster_vit_"


def is_fastervit(name: str) -> bool:
    return name.startswith(_PREFIX)


def import_fastervit():
    """Importing the package makes its networks known to timm.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import fastervit  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "FasterViT is not in timm but in its own package, which is not installed: pip install 'fastervit>=1.0'"
        ) from error


def fastervit_arguments(name: str, image_size: int, own_size: int) -> dict[str, Any]:
    """What `timm.create_model` needs for images of this side in pixels.

    Raises:
        ValueError: a network for one size and another side.
    """
    if name.endswith("_any_res"):
        return {"resolution": image_size}
    if image_size != own_size:
        raise ValueError(
            f"image_size is {image_size}, but {name} is built for {own_size} pixels; set image_size={own_size}, or "
            "choose a network whose name ends in _any_res."
        )
    return {}


def complete_fastervit(network: Any):
    """Adds what a student reads from every network of timm: widths, stages, groups of blocks."""
    width = network.norm.num_features  # channels double up to the third stage, and so does the stride, from 8 to 32
    stages = [(width // 4, 8), (width // 2, 16), (width, 32), (width, 32)]
    network.feature_info = [{"num_chs": channels, "reduction": stride} for channels, stride in stages]
    network.num_features = network.head_hidden_size = width
    network.group_matcher = _blocks_of_levels
    network.forward_intermediates = partial(_forward_intermediates, network)
    network.forward_head = partial(_forward_head, network)
    for module in network.modules():
        if hasattr(module, "to_global_feature"):
            del module.pos_embed  # a second name of a part of it, which a checkpoint would hold twice
        if hasattr(module, "relative_bias"):
            module.register_forward_hook(_let_go_of_graph)
        if hasattr(module, "relative_coords_table"):  # made in float32, whatever the default dtype is
            module.relative_coords_table = module.relative_coords_table.to(module.relative_bias.dtype)


def _let_go_of_graph(module: Any, inputs: Any, output: Any):
    """The package keeps each pass's position bias with its graph, and a model with a graph cannot be copied."""
    module.relative_bias, module.pos_emb = module.relative_bias.detach(), None


def _blocks_of_levels(coarse: bool = False) -> dict[str, str]:
    return {"blocks": r"^levels\.(\d+)"}


def _forward_head(network: Any, final: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
    pooled = network.avgpool(final).flatten(1)  # (B, D, h, w) -> (B, D)
    return pooled if pre_logits else network.head(pooled)


def _forward_intermediates(
    network: Any,
    pixels: torch.Tensor,
    indices: list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As timm's: `(B, C, H, W)` -> what `forward_features` returns, and the maps `(B, D, h, w)` of the levels."""
    levels = network.levels
    wanted = range(len(levels)) if indices is None else indices
    x, found = network.patch_embed(pixels), []
    for index, level in enumerate(levels):
        x = level(x)
        if index in wanted:
            is_last = index == len(levels) - 1
            found.append(network.norm(x) if norm and is_last else x)
        if stop_early and index == max(wanted):
            return x, found
    return network.norm(x), found
