"""A student as the eye of LLaVA: transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision, and the original code base."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from transformers_radio.evaluation.llava.model import check_image_size
from transformers_radio.modeling import (
    RadioImageProcessor,
    RadioLlavaProcessor,
    RadioVisionTower,
    RadioVisionTowerConfig,
)
from transformers_radio.modeling.errors_radio import shown

from .students import open_student

Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration


def swap_vision_tower(llava: Any, student: Any, image_size: int | None = None) -> Any:
    """Put a student into a LLaVA of transformers in place of its vision tower.

        llava = swap_vision_tower(LlavaForConditionalGeneration.from_pretrained(name), "runs/mine/student")
        processor = llava_processor(llava, LlavaProcessor.from_pretrained(name))

    The language model reads the patch tokens of the student's last layer (paper section 5.4), without class or
    register tokens. The projector is built anew, for the student's width, with random weights: it would have to read
    another space, so train it. `llava.save_pretrained` writes all of it, and `from_pretrained` of the same class opens
    it. To put other weights into a RADIO tower and keep the projector, use `load_student(llava, student)`.

    Args:
        llava: a `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` or
            `LlavaOnevisionForConditionalGeneration`; it is changed in place.
        student: a student, of which a copy becomes the tower, or its folder or Hub id. Its adaptors are left out.
        image_size: LLaVA: the longest side of an image in pixels, whose aspect ratio stays. LLaVA-NeXT and OneVision:
            the side of their square tiles; the layouts of tiles (`image_grid_pinpoints`) stay the same in tiles.
            The student's preferred resolution when missing.

    Returns:
        `llava`.

    Raises:
        OSError: there is no such student.
        ValueError: another kind of model or student, or an image size that the student does not take.
    """
    if not isinstance(llava, Llava):
        raise ValueError(
            f"llava is {shown(llava)}; a student can be the tower of LlavaForConditionalGeneration, "
            "LlavaNextForConditionalGeneration and LlavaOnevisionForConditionalGeneration."
        )
    student = open_student(student)
    if student.config.model_type not in ("radio", "eradio", "radio_timm"):
        raise ValueError(
            f"The student is a {type(student).__name__}, which cannot be saved with a LLaVA: its vision tower takes "
            "students of type radio, eradio and radio_timm."
        )
    image_size = student.preferred_resolution if image_size is None else image_size
    check_image_size(student, image_size)
    config: Any = llava.config
    projector = llava.model.multi_modal_projector
    weight = next(projector.parameters())
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = _scaled(config.image_grid_pinpoints, config.vision_config.image_size, image_size)
    tower = RadioVisionTower.from_radio(student, image_size).to(weight.device, weight.dtype)  # type: ignore[call-arg]
    llava.model.vision_tower = tower.train(llava.training)
    config.vision_config = tower.config
    config.vision_feature_layer = -1
    config.vision_feature_select_strategy = "default"  # drops the tower's summary token
    if hasattr(config, "image_seq_length"):
        config.image_seq_length = (image_size // tower.patch_size) ** 2
    llava.model.multi_modal_projector = type(projector)(config).to(weight.device, weight.dtype).train(llava.training)
    return llava


def llava_processor(llava: Any, processor: Any) -> Any:
    """The processor of a LLaVA that has a student as tower, with the tokenizer and chat template of its old one.

    It counts the image tokens that the tower makes, and gives pixels in [0, 1], which the student normalizes.

    Args:
        llava: what [`swap_vision_tower`] returned.
        processor: the processor of the LLaVA before the swap; it stays as it is.

    Returns:
        A [`RadioLlavaProcessor`] for LLaVA, whose images keep their aspect ratio. For LLaVA-NeXT and OneVision a
        processor of the same class, with square tiles of the tower's size.

    Raises:
        ValueError: a LLaVA without a student, or the processor of another kind of model.
    """
    tower = getattr(getattr(llava, "model", None), "vision_tower", None)
    if not isinstance(tower, RadioVisionTower):
        raise ValueError(
            f"llava is a {type(llava).__name__} with a {type(tower).__name__} as tower; swap a student in first "
            "(swap_vision_tower)."
        )
    side, patch = tower.config.image_size, tower.patch_size
    if isinstance(llava, LlavaForConditionalGeneration):
        return RadioLlavaProcessor(
            RadioImageProcessor(size={"longest_edge": side}, size_divisor=tower.model.min_resolution_step),
            processor.tokenizer,
            patch_size=patch,
            vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # the tower's summary token
            chat_template=processor.chat_template,
            image_token=processor.image_token,
        )
    is_next = isinstance(llava, LlavaNextForConditionalGeneration)
    expected: Any = LlavaNextProcessor if is_next else LlavaOnevisionProcessor
    if not isinstance(processor, expected):
        raise ValueError(
            f"processor is a {type(processor).__name__}; a {type(llava).__name__} has a {expected.__name__}."
        )
    processor = copy.deepcopy(processor)
    tiles: dict[str, Any] = {"image_grid_pinpoints": llava.config.image_grid_pinpoints, "do_normalize": False}
    square = {"height": side, "width": side}
    if isinstance(processor, LlavaNextProcessor):
        processor.patch_size, processor.num_additional_image_tokens = patch, 1
        processor.vision_feature_select_strategy = llava.config.vision_feature_select_strategy
        tiles |= {"size": {"shortest_edge": side}, "crop_size": square}
    else:
        # its count knows no summary token: with "default" it would take away one that it has not counted
        processor.num_image_tokens, processor.vision_feature_select_strategy = (side // patch) ** 2, "full"
        tiles |= {"size": square}
        if processor.video_processor is not None:
            processor.video_processor.size = square
            processor.video_processor.do_normalize = False
    images = processor.image_processor
    processor.image_processor = type(images).from_dict({**images.to_dict(), **tiles})
    return processor


def _scaled(pinpoints: list[list[int]], old: int, new: int) -> list[list[int]]:
    """The same layouts in tiles of another side: (height, width) in pixels each."""
    return [[side * new // old for side in layout] for layout in pinpoints]


class OriginalLlavaTower(nn.Module):
    """What the original LLaVA code base builds as vision tower, with a student in it; see [`llava_vision_tower`].

    Its names and arguments are those that this code base uses. Images are what `image_processor` makes, in [0, 1].
    """

    def __init__(self, vision_tower: str, args: Any = None, delay_load: bool = False, image_size: int | None = None):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = str(vision_tower)
        self.select_layer = getattr(args, "mm_vision_select_layer", -1)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature is {self.select_feature!r}, expected 'patch' or 'cls_patch'.")
        self.cfg_only = RadioVisionTowerConfig.from_pretrained(self.vision_tower_name)
        # the embeddings and every block; E-RADIO and networks of timm have their features alone
        count = getattr(self.cfg_only.radio_config, "num_hidden_layers", 0) + 1
        if not -count <= self.select_layer < count:
            raise ValueError(
                f"mm_vision_select_layer is {self.select_layer}, expected a number from {-count} to {count - 1} for "
                f"this student of type {self.cfg_only.radio_config.model_type}; -1 is the last layer."
            )
        if image_size is not None:
            self.cfg_only.image_size = image_size
            self.cfg_only.validate()
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Loads the weights, frozen; to train them, call `vision_tower.requires_grad_(True)` afterwards.

        Raises:
            ValueError: an image size that the student does not take, or weights that do not fit.
        """
        if self.is_loaded:
            return
        tower = RadioVisionTower.from_pretrained(self.vision_tower_name, device_map=device_map)
        tower.config.image_size = self.cfg_only.image_size
        check_image_size(tower.model, tower.config.image_size)
        self.vision_tower = tower.requires_grad_(False).eval()
        side, mean = tower.config.image_size, tower.config.radio_config.norm_mean
        self.image_processor = CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_normalize=False,  # the student does it
            image_mean=list(mean),  # the color that LLaVA pads images with
            image_std=list(tower.config.radio_config.norm_std),
        )
        self.is_loaded = True

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """`(B, N, hidden_size)` of the chosen layer: the patches, with "cls_patch" behind one summary token."""
        tokens = image_forward_outs.hidden_states[self.select_layer]
        return tokens[:, 1:] if self.select_feature == "patch" else tokens

    def forward(self, images: Any) -> Any:
        """Images `(B, 3, H, W)` in [0, 1] -> `(B, N, hidden_size)`; a list of `(3, H, W)` -> a list of (1, N, ...).

        Features have the dtype of the images. Gradients flow where weights are trainable.
        """
        if isinstance(images, (list, tuple)):
            return [self.forward(image.unsqueeze(0)) for image in images]
        pixel_values = images.to(device=self.device, dtype=self.dtype)
        return self.feature_select(self.vision_tower(pixel_values, output_hidden_states=True)).to(images.dtype)

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> RadioVisionTowerConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def llava_vision_tower(
    vision_tower: str, args: Any = None, delay_load: bool = False, image_size: int | None = None
) -> OriginalLlavaTower:
    """The vision tower for the original LLaVA code base, whose `build_vision_tower` would make a CLIP with random
    weights of a student's folder. Return this from it instead:

        def build_vision_tower(vision_tower_cfg, **kwargs):
            return llava_vision_tower(vision_tower_cfg.mm_vision_tower, args=vision_tower_cfg, **kwargs)

    Args:
        vision_tower: folder or Hub id of a student (RADIO, E-RADIO or timm) or of a [`RadioVisionTower`].
        args: with `mm_vision_select_layer` (the last layer when missing; E-RADIO and timm have only this one),
            `mm_vision_select_feature` ("patch" or "cls_patch") and `unfreeze_mm_vision_tower`.
        delay_load: read only the configuration until `load_model()`.
        image_size: side of an image or tile in pixels; the student's preferred resolution when missing.

    Raises:
        OSError: there is no such folder.
        ValueError: the folder of another kind of model, an image size that the student does not take, or a layer that
            it does not have.
    """
    return OriginalLlavaTower(vision_tower, args, delay_load, image_size)
