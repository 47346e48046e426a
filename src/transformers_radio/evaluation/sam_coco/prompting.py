"""SAM's prompt encoder and mask decoder behind another image encoder: box prompts in, masks out.

The paper's COCO column (Table 1) uses the teacher's decoder without finetuning it: the student's features take the
place of SAM's own, and nothing is trained. An encoder is any callable: uint8 images (B, 3, H, W) -> embeddings
(B, C, g, g) that SAM's decoder reads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from transformers_radio.modeling.parts_radio import rest_if_frozen

Encoder = Callable[[torch.Tensor], torch.Tensor]


class SamEncoder(nn.Module):
    """SAM's own image encoder: the row that a student is compared with.

    Args:
        sam: a whole SAM, see `teachers.segment_anything.load_sam`.
    """

    def __init__(self, sam: Any):
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.image_size: int = sam.image_encoder.img_size
        self.window_size = None  # SAM's windows are its own
        self.preprocess = sam.preprocess

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) of any size -> (B, C, g, g)."""
        images = resize_longest_side(images, self.image_size)
        return self.image_encoder(self.preprocess(images.float()))


class AdaptorMaps(nn.Module):
    """The features of a student's adaptor as maps on a fixed grid.

    Args:
        student: a `RadioModel` or another student with this adaptor.
        adaptor: its name.
        grid: rows and columns of the maps; features on another grid are interpolated bilinearly.
        image_size: side of the student's square input in pixels.
        window_size: None for the student's own. Of a RADIO as in its forward, 0 for global attention; of an E-RADIO as
            `config.window_size`, 0 for windows that follow from the image.

    Raises:
        ValueError: windows that the student does not have, or an image_size that it (with them) does not take.
    """

    def __init__(
        self, student: Any, adaptor: str, grid: tuple[int, int], image_size: int, window_size: int | None = None
    ):
        super().__init__()
        if window_size is not None and not hasattr(student.config, "window_size"):
            raise ValueError("The student has no attention windows: leave window_size out.")
        step, options = student.min_resolution_step, {}
        if window_size is not None and student.config.model_type == "eradio":  # whose forward has no such option
            student = student.with_adaptors(list(student.adaptors))  # the same weights, a configuration of its own
            student.config.window_size = window_size or None
            student.config.validate()
        elif window_size is not None:
            step, options = student.patch_size * max(window_size, 1), {"window_size": window_size}
        if image_size < step or image_size % step:
            windows = f" with window_size {window_size}" if window_size else ""
            other = ", or another window_size (0 for global attention)" if windows else ""
            raise ValueError(
                f"image_size is {image_size}, but the student{windows} takes multiples of {step}: use "
                f"{max(1, round(image_size / step)) * step}{other}."
            )
        nearest = student.get_nearest_supported_resolution(image_size, image_size)
        if not options and nearest != (image_size, image_size):  # a network that is built for one size
            raise ValueError(f"image_size is {image_size}, which the student does not take: use {nearest[0]}.")
        self.student = student
        self.adaptor = adaptor
        self.grid = grid
        self.image_size = image_size
        self.window_size = window_size
        self.options = options

    def train(self, mode: bool = True) -> "AdaptorMaps":
        super().train(mode)
        rest_if_frozen(self.student)
        return self

    def maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] (B, 3, image_size, image_size) -> (B, feature_dim, *grid), float32; gradients flow."""
        pixel_values = pixel_values.to(self.student.dtype)
        output = self.student(pixel_values, adaptors=[self.adaptor], **self.options).adaptors[self.adaptor]
        maps = output.features.transpose(1, 2).unflatten(2, output.grid)  # (B, h*w, C) -> (B, C, h*w) -> (B, C, h, w)
        if maps.shape[2:] != self.grid:
            maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
        return maps


class StudentEncoder(AdaptorMaps):
    """A student's adaptor to SAM in place of SAM's image encoder.

    Images are scaled as SAM scales them, longest side to image_size, and filled up to a square at the right and the
    bottom with SAM's mean color, so that the student sees what SAM sees. Its feature grid is brought to SAM's by
    bilinear interpolation. Features of the width of SAM's blocks then pass SAM's own neck; features of the neck's
    output width are the embedding already.

    Args:
        student: a `RadioModel` or another student with an adaptor to SAM, on SAM's device.
        sam: the whole SAM whose image encoder was the adaptor's teacher, float32.
        adaptor: its name.
        image_size: side of the student's square input in pixels; None for SAM's own (1024).
        window_size: as in [`AdaptorMaps`].

    Raises:
        ValueError: no such adaptor, an adaptor without features, or features of another width than this SAM's; an
            image_size that the student (with these windows) does not take.
    """

    def __init__(
        self,
        student: Any,
        sam: Any,
        adaptor: str = "sam",
        image_size: int | None = None,
        window_size: int | None = None,
    ):
        needs_neck = _needs_neck(student, sam, adaptor)
        image_size = sam.image_encoder.img_size if image_size is None else image_size
        super().__init__(student, adaptor, tuple(sam.prompt_encoder.image_embedding_size), image_size, window_size)
        self.neck = sam.image_encoder.neck if needs_neck else nn.Identity()
        self.padding: torch.Tensor
        self.register_buffer("padding", sam.pixel_mean / 255, persistent=False)  # (3, 1, 1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) of any size -> (B, C, g, g)."""
        size = self.image_size
        images = resize_longest_side(images, size).float() / 255
        pixel_values = self.padding.repeat(len(images), 1, size, size)  # (3, 1, 1) -> (B, 3, size, size)
        pixel_values[..., : images.shape[2], : images.shape[3]] = images
        return self.embed(pixel_values)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Padded images in [0, 1] (B, 3, image_size, image_size) -> (B, C, g, g); gradients flow."""
        maps = self.maps(pixel_values)
        weight = next(self.neck.parameters(), maps)
        return self.neck(maps.to(weight.dtype))


def feature_width(student: Any, adaptor: str) -> int | None:
    """Width of the features of a student's adaptor to SAM; None for an adaptor without features.

    Raises:
        ValueError: no such adaptor.
    """
    adaptors = student.config.adaptors
    if adaptor not in adaptors:
        raise ValueError(
            f"The student has no adaptor {adaptor!r}, it has {sorted(adaptors)}: name its adaptor to SAM, or distill "
            "a student with SAM among its teachers."
        )
    return adaptors[adaptor]["feature_dim"]


def _needs_neck(student: Any, sam: Any, adaptor: str) -> bool:
    """Whether the adaptor's features are those of SAM's blocks (True) or of its neck's output (False)."""
    width, adaptors = feature_width(student, adaptor), student.config.adaptors
    trunk, neck = sam.image_encoder.neck[0].in_channels, sam.image_encoder.neck[0].out_channels
    if width not in (trunk, neck):
        teacher = adaptors[adaptor].get("teacher") or "unknown"
        raise ValueError(
            f"The adaptor {adaptor!r} (teacher: {teacher}) has features of width {width}, but this SAM's have {trunk} "
            f"before its neck and {neck} after it: use the SAM checkpoint that the adaptor was distilled from."
        )
    if trunk == neck:
        raise ValueError(
            f"This SAM's features have width {trunk} both before and after its neck, so the adaptor {adaptor!r} does "
            "not tell which of them it was distilled from: use a SAM with two widths."
        )
    return width == trunk


def resize_longest_side(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, h, w) with max(h, w) == size, by SAM's own resize (Pillow, bilinear).

    Raises:
        ValueError: other shapes or dtypes.
    """
    from segment_anything.utils.transforms import ResizeLongestSide  # whoever has a SAM has it installed

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 (B, 3, H, W).")
    if max(images.shape[2:]) == size:
        return images
    resize = ResizeLongestSide(size).apply_image  # takes and gives (H, W, 3)
    resized = [torch.from_numpy(resize(image.permute(1, 2, 0).cpu().numpy())) for image in images]
    return torch.stack(resized).permute(0, 3, 1, 2).contiguous().to(images.device)  # (B, h, w, 3) -> (B, 3, h, w)


@torch.no_grad()
def predict_masks(
    sam: Any, embedding: torch.Tensor, boxes: np.ndarray, original_size: tuple[int, int], best_of_three: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the boxes of one image, as `segment_anything.SamPredictor` makes them.

    Args:
        embedding: (1, C, g, g) from an encoder.
        boxes: (N, 4), N >= 1; x0, y0, x1, y1 in pixels of the original image.
        original_size: (H, W) of the image before it was resized.
        best_of_three: of the three masks for unclear prompts, the one with the highest predicted IoU; otherwise the
            single mask.

    Returns:
        bool (N, H, W), and the predicted IoU (N,).
    """
    from segment_anything.utils.transforms import ResizeLongestSide

    # float64 until the end, as in SamPredictor: prompts are equal to the last bit
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    scaled = resize.apply_boxes(np.asarray(boxes, dtype=np.float64), original_size)
    prompts = torch.as_tensor(scaled, dtype=torch.float32, device=embedding.device)
    encoded = sam.prompt_encoder(points=None, boxes=prompts, masks=None)
    return _decode(sam, embedding, encoded, original_size, best_of_three)


@torch.no_grad()
def predict_masks_at_points(
    sam: Any, embedding: torch.Tensor, points: np.ndarray, original_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the things at points of one image, as `segment_anything.SamPredictor` makes them.

    A point does not tell how large the thing is: the best of SAM's three masks is taken.

    Args:
        embedding: (1, C, g, g) from an encoder.
        points: (N, 2), N >= 1, one per mask; x, y in pixels of the original image.
        original_size: (H, W) of the image before it was resized.

    Returns:
        bool (N, H, W), and the predicted IoU (N,).
    """
    from segment_anything.utils.transforms import ResizeLongestSide

    resize = ResizeLongestSide(sam.image_encoder.img_size)
    scaled = resize.apply_coords(np.asarray(points, dtype=np.float64), original_size)
    prompts = torch.as_tensor(scaled, dtype=torch.float32, device=embedding.device)[:, None]  # (N, 2) -> (N, 1, 2)
    on_object = torch.ones(len(prompts), 1, dtype=torch.int, device=embedding.device)
    encoded = sam.prompt_encoder(points=(prompts, on_object), boxes=None, masks=None)
    return _decode(sam, embedding, encoded, original_size, best_of_three=True)


def _decode(
    sam: Any,
    embedding: torch.Tensor,
    prompts: tuple[torch.Tensor, torch.Tensor],
    original_size: tuple[int, int],
    best_of_three: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """prompts: what the prompt encoder returns, sparse (N, tokens, C) and dense (N, C, g, g)."""
    from segment_anything.utils.transforms import ResizeLongestSide

    sparse, dense = prompts
    logits, predicted_iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=best_of_three,
    )  # (N, M, 4 g, 4 g) and (N, M) with M = 1 or 3
    predicted_iou, best = predicted_iou.max(dim=1)
    logits = logits[torch.arange(len(logits)), best][:, None]  # (N, 1, 4 g, 4 g)
    input_size = ResizeLongestSide.get_preprocess_shape(*original_size, sam.image_encoder.img_size)
    masks = sam.postprocess_masks(logits, input_size, original_size)[:, 0] > sam.mask_threshold  # (N, H, W)
    return masks, predicted_iou
