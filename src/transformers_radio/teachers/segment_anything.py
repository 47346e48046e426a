"""The original Segment Anything checkpoints (.pth) as teachers, and as the whole SAM for evaluation."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import one_line

from .base import Teacher, TeacherOutput, flatten_grid, require, resolve_image_size
from .checkpoints import load_weights, resolve_checkpoint

# Three things that a SAM checkpoint does not say, the same in every released one: the mean and std in 0..255, the
# LayerNorm epsilon of the image encoder, and the number of heads of the mask decoder.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
ENCODER_NORM_EPS = 1e-6
DECODER_HEADS = 8


class SegmentAnythingTeacher(Teacher):
    """SAM's image encoder; it has no summary.

    Args:
        encoder: an ImageEncoderViT; its position table is resized here.
        image_size: side of the input in pixels; None for the encoder's own (1024). For another size the absolute
            position embedding is resized as in ViTDet, from which SAM's encoder comes (bicubic); segment_anything
            itself interpolates relative positions linearly, and windows keep their size.
        features: "trunk", the output of the last block before the neck (SAM-H: 1280 channels), which the paper
            distills, or "neck", the neck's output that SAM's mask decoder reads (256 channels).

    Raises:
        ValueError: for an unknown `features`, or an image_size that is not a multiple of the patch size.
    """

    def __init__(self, encoder: Any, image_size: int | None = None, features: str = "trunk"):
        check_features(features)
        patch_size = encoder.patch_embed.proj.kernel_size[0]
        image_size = resolve_image_size(image_size, encoder.img_size, patch_size)
        if image_size != encoder.img_size:
            encoder.pos_embed = resize_positions(encoder.pos_embed, image_size // patch_size)
            encoder.img_size = image_size
        super().__init__(
            encoder,
            image_size=image_size,
            patch_size=patch_size,
            summary_dim=None,
            feature_dim=encoder.neck[0].in_channels if features == "trunk" else encoder.neck[0].out_channels,
            normalization=([value / 255 for value in PIXEL_MEAN], [value / 255 for value in PIXEL_STD]),
        )
        self.features = features

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32", features: str = "trunk"
    ) -> Teacher:
        """As `Teacher.from_checkpoint`.

        Args:
            checkpoint: an original .pth file, or "hf-hub:OWNER/NAME/FILE". It may be one of HQ-SAM, or one that was
                trained further: nothing but the image encoder is read.

        Raises:
            ValueError: for a file that is no SAM checkpoint or holds pickled code.
        """
        check_features(features)  # before the weights are read
        return cls(load_sam_encoder(checkpoint), image_size, features).cast(dtype)

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        encoder = self.model
        hidden = encoder.patch_embed(pixel_values) + encoder.pos_embed  # (B, h, w, C)
        for block in encoder.blocks:
            hidden = block(hidden)
        hidden = hidden.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return TeacherOutput(None, *flatten_grid(hidden if self.features == "trunk" else encoder.neck(hidden)))


def check_features(features: str) -> None:
    """Raises a ValueError unless `features` is "trunk" or "neck"."""
    if features not in ("trunk", "neck"):
        raise ValueError(f"features={features!r} is unknown: SAM gives 'trunk' (before the neck) or 'neck'")


def resize_positions(positions: nn.Parameter, grid: int) -> nn.Parameter:
    """Absolute position embedding (1, g, g, C) of a SAM encoder for another grid, bicubic as in ViTDet."""
    table = positions.detach().permute(0, 3, 1, 2)  # (1, g, g, C) -> (1, C, g, g)
    table = nn.functional.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return nn.Parameter(table.permute(0, 2, 3, 1).contiguous(), requires_grad=False)


def load_sam(checkpoint: str) -> Any:
    """The whole `segment_anything.Sam` of an original checkpoint, in eval mode, float32, on the CPU.

    The architecture is read off the weights, so every size loads through this one function.

    Args:
        checkpoint: an original .pth file, or "hf-hub:OWNER/NAME/FILE".

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no SAM checkpoint (HQ-SAM's decoder is another one) or holds pickled code.
    """
    sa = require("segment_anything.modeling")
    weights = load_weights(_local_file(checkpoint))
    shape = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    mask_layer = "mask_decoder.transformer.layers.0."
    with _faults_named(checkpoint), torch.device("meta"):
        image_encoder = _image_encoder(checkpoint, shape)
        out_channels = shape["image_encoder.neck.0.weight"][0]
        side, patch_size = image_encoder.img_size, image_encoder.patch_embed.proj.kernel_size[0]
        prompt_encoder = sa.PromptEncoder(
            embed_dim=out_channels,
            image_embedding_size=(side // patch_size, side // patch_size),
            input_image_size=(side, side),
            mask_in_chans=shape["prompt_encoder.mask_downscaling.3.weight"][0],
        )
        mask_decoder = sa.MaskDecoder(
            transformer_dim=out_channels,
            transformer=sa.TwoWayTransformer(
                depth=_count(shape, "mask_decoder.transformer.layers."),
                embedding_dim=out_channels,
                num_heads=DECODER_HEADS,
                mlp_dim=shape[f"{mask_layer}mlp.lin1.weight"][0],
                attention_downsample_rate=out_channels
                // shape[f"{mask_layer}cross_attn_token_to_image.q_proj.weight"][0],
            ),
            num_multimask_outputs=shape["mask_decoder.mask_tokens.weight"][0] - 1,
            iou_head_depth=_count(shape, "mask_decoder.iou_prediction_head.layers."),
            iou_head_hidden_dim=shape["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        )
    with _faults_named(checkpoint):
        sam = sa.Sam(image_encoder, prompt_encoder, mask_decoder, list(PIXEL_MEAN), list(PIXEL_STD))
        sam.load_state_dict(weights, strict=True, assign=True)
    return sam.float().requires_grad_(False).eval()


def load_sam_encoder(checkpoint: str) -> Any:
    """The image encoder alone, as `load_sam` has it. Nothing else in the file is read: its decoder may be of another
    kind (HQ-SAM), fine-tuned, or missing."""
    require("segment_anything.modeling")  # before the file is looked for
    weights = load_weights(_local_file(checkpoint))
    weights = {name: tensor for name, tensor in weights.items() if name.startswith("image_encoder.")}
    with _faults_named(checkpoint):
        with torch.device("meta"):
            encoder = _image_encoder(checkpoint, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        nn.ModuleDict({"image_encoder": encoder}).load_state_dict(weights, strict=True, assign=True)
    return encoder.float().requires_grad_(False).eval()


def _image_encoder(checkpoint: str, shape: dict[str, tuple[int, ...]]) -> Any:
    """The architecture of the weights that have these shapes. To be called on the meta device, where no random
    initialization has to be waited for: the weights are assigned.

    Image size = position grid x patch; heads = width / relative-position width; a block whose relative-position table
    has 2g-1 rows (g the grid side) attends globally, any other in windows of (rows+1)/2.
    """
    _, grid, _, width = shape["image_encoder.pos_embed"]
    depth = _count(shape, "image_encoder.blocks.")
    tables = [shape[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)]
    windows = {(rows + 1) // 2 for rows, _ in tables if rows != 2 * grid - 1}
    if len(windows) > 1:
        raise ValueError(f"{checkpoint} mixes the window sizes {sorted(windows)}, which segment_anything cannot build")
    patch_size = shape["image_encoder.patch_embed.proj.weight"][-1]
    return require("segment_anything.modeling").ImageEncoderViT(
        img_size=grid * patch_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=width // tables[0][1],
        mlp_ratio=shape["image_encoder.blocks.0.mlp.lin1.weight"][0] / width,
        out_chans=shape["image_encoder.neck.0.weight"][0],
        qkv_bias="image_encoder.blocks.0.attn.qkv.bias" in shape,
        norm_layer=functools.partial(nn.LayerNorm, eps=ENCODER_NORM_EPS),
        use_rel_pos=True,
        window_size=windows.pop() if windows else 0,
        global_attn_indexes=tuple(i for i, (rows, _) in enumerate(tables) if rows == 2 * grid - 1),
    )


def _local_file(checkpoint: str) -> str:
    """The path of a checkpoint, from the Hub's cache where it names one of its files."""
    if not checkpoint.startswith("hf-hub:"):
        return resolve_checkpoint(checkpoint)
    from huggingface_hub import hf_hub_download

    owner, _, rest = checkpoint.removeprefix("hf-hub:").partition("/")
    name, _, filename = rest.partition("/")
    if not filename:
        raise ValueError(f"{checkpoint} names no file: write hf-hub:OWNER/NAME/FILE")
    return hf_hub_download(f"{owner}/{name}", filename)


@contextlib.contextmanager
def _faults_named(checkpoint: str) -> Iterator[None]:
    """ValueErrors for keys and shapes that are not those of a SAM."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{checkpoint} is no original SAM checkpoint: it lacks the key {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError) as error:
        raise ValueError(
            f"{checkpoint} does not fit the architecture read off its own shapes: {one_line(error)}"
        ) from error


def _count(shape: dict[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbered layers there are below a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shape if name.startswith(prefix)})
