"""Images of different sizes in one padded batch, each computed as if it were alone."""

from typing import Any

import torch

from .adaptors_radio import AdaptorOutput
from .inputs_radio import check_mask, returns_tensors_only
from .student_radio import RadioModelOutput


def padded_grids(pixel_mask: torch.Tensor, pixel_values: torch.Tensor, patch_size: int, step: int) -> torch.Tensor:
    """The patch grid of each image in a padded batch.

    Args:
        pixel_mask (`torch.Tensor` of shape `(batch, height, width)`): 1 on the image, which lies at the top left.
        step (`int`): Image sides are rounded up to a multiple of this many pixels.

    Returns:
        `torch.Tensor` of shape `(batch, 2)`: rows and columns of patches of each image.

    Raises:
        ValueError: The mask has another shape, or does not mark one rectangle at the top left of every image.
    """
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    check_mask(pixel_mask, expected)
    inside = pixel_mask.bool()
    sides = torch.stack([inside[:, :, 0].sum(1), inside[:, 0].sum(1)], dim=1)  # (B, 2)
    # compared with the mask itself, not `inside`: its values must be 0 and 1
    is_rectangle = (pixel_mask == top_left(sides, *expected[1:])).flatten(1).all(1) & (sides[:, 0] > 0)
    if not is_rectangle.all():
        raise ValueError(
            f"pixel_mask of image {int(is_rectangle.int().argmin())} is not a rectangle at the top left, of ones with "
            "zeros around it; pad images at the bottom and right only, as RadioImageProcessor does."
        )
    return (sides + step - 1) // step * (step // patch_size)


def top_left(sides: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(B, 2)` rows and columns -> `(B, height, width)`, True on that many at the top left."""
    rows = torch.arange(height, device=sides.device) < sides[:, :1]  # (B, height)
    columns = torch.arange(width, device=sides.device) < sides[:, 1:]  # (B, width)
    return rows[:, :, None] & columns[:, None]


def forward_padded(
    model, pixel_values: torch.Tensor, grids: torch.Tensor, window_size: int, **options
) -> RadioModelOutput:
    """Outputs of a padded batch, in its own layout; tokens of patches in the padding are zero.

    With global attention the images are packed into one sequence. Packed images have no windows, so with windows
    they run one by one.

    Args:
        grids (`torch.Tensor` of shape `(batch, 2)`): Rows and columns of patches of each image.
    """
    if options["output_attentions"]:
        raise ValueError("output_attentions has no layout for a padded batch; pass images of one size at a time.")
    patch_size = model.patch_size
    batch, _, height, width = pixel_values.shape
    inside = top_left(grids, *model.grid(height, width))  # (B, h, w)
    if window_size:
        sides = (grids * patch_size).tolist()
        images = [image[None, :, :h, :w] for image, (h, w) in zip(pixel_values, sides, strict=True)]
        packed: Any = _pack([model(image, window_size=window_size, **options) for image in images])
    else:
        # (B, C, h*p, w*p) -> (B, C, h, p, w, p) -> (B, h, w, C, p, p) -> (patches of the images, C*p*p)
        patches = pixel_values.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
        packed = model(patches[inside].flatten(1), image_grid_hw=grids, window_size=0, **options)

    def unpack(tokens: torch.Tensor | None, num_prefix: int = 0) -> Any:
        if tokens is None:
            return None
        tokens = tokens.flatten(0, -2)  # hidden states have a batch axis of 1
        # the grid of an adaptor may be finer; hidden states have prefix tokens for every image
        factor = 1 if num_prefix else round((tokens.shape[0] / int(inside.sum())) ** 0.5)
        there = inside.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)
        there = torch.cat([there.new_ones(batch, num_prefix), there], dim=1)  # (B, prefix + h*w)
        padded = tokens.new_zeros(*there.shape, tokens.shape[-1])
        padded[there] = tokens
        return padded

    def finer_grid(factor: int) -> tuple[int, int] | None:
        rows, cols = model.grid(height, width)
        return None if returns_tensors_only() else (rows * factor, cols * factor)

    prefix = model.config.num_summary_tokens
    return RadioModelOutput(
        summary=packed.summary,
        features=unpack(packed.features),
        last_hidden_state=unpack(packed.last_hidden_state, prefix),
        hidden_states=None if packed.hidden_states is None else tuple(unpack(t, prefix) for t in packed.hidden_states),
        adaptors={
            name: AdaptorOutput(
                summary=head.summary,
                features=unpack(head.features),
                grid=None if head.features is None else finer_grid(model.adaptors[name].upsample_factor),
            )
            for name, head in packed.adaptors.items()
        },
        grid=finer_grid(1),
    )


def _pack(outputs: list[Any]) -> RadioModelOutput:
    """Outputs of single images in the layout of packed ones: the images' tokens follow each other."""

    def join(tensors):
        return None if tensors[0] is None else torch.cat([tensor[0] for tensor in tensors])

    first = outputs[0]
    layers = None if first.hidden_states is None else zip(*(o.hidden_states for o in outputs), strict=True)
    return RadioModelOutput(
        summary=torch.cat([o.summary for o in outputs]),
        features=join([o.features for o in outputs]),
        last_hidden_state=join([o.last_hidden_state for o in outputs]),
        hidden_states=None if layers is None else tuple(join(layer) for layer in layers),
        adaptors={
            name: AdaptorOutput(
                summary=None if head.summary is None else torch.cat([o.adaptors[name].summary for o in outputs]),
                features=join([o.adaptors[name].features for o in outputs]),
            )
            for name, head in first.adaptors.items()
        },
    )
