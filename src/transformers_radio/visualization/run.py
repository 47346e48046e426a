"""`transformers-radio visualize KIND`: loads models and a few images, and writes PNG files."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torchvision.transforms.v2.functional import pil_to_tensor

from transformers_radio.evaluation.images.resize import cover_image
from transformers_radio.evaluation.models.encoder import VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.paths import expand_home
from transformers_radio.evaluation.result import slug
from transformers_radio.evaluation.run import check_pictures, load_config
from transformers_radio.evaluation.sam_coco.prompting import StudentEncoder
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import load_sam

from .attention import attention_figure, summary_attention
from .features import common_columns, own_columns
from .heat_map import heat_map_figure, text_similarity
from .masks import masks_figure
from .pictures import Picture, load_pictures
from .positions import positions_figure
from .teacher_student import teacher_student_figure

logger = logging.getLogger(__name__)

BASES = ("images", "image", "models")
MAX_SHOWN = 512  # pixels: side of the images in pictures


@dataclass
class VisualizeConfig:
    """Settings of all kinds of pictures."""

    data: str | None = None  # an image, a folder of images, or anything datasets.load_dataset opens
    split: str = "validation"
    image_column: str | None = None  # null: found among the usual names
    images: int = 6  # the first ones of the data
    image_size: int | None = None  # side of students' input in pixels; null: the size that each prefers
    teacher_image_size: int | None = None  # null: each teacher's own
    dtype: str = "float32"
    # features: which patches share a PCA basis. images: those of a model, over all images. image: those of an image.
    # models: those of a teacher and of the students' adaptors to it; students alone share the first one's basis.
    basis: str = "images"
    layer: int = -1  # attention: number of the block, from 0; negative: from the end
    heads: bool = False  # attention: each head of one class token, instead of each class token over all heads
    token: int = 0  # attention: the class token whose heads are shown
    prompts: list[str] = field(default_factory=list)  # heat-map: texts
    adaptor: str | None = None  # heat-map: a student's adaptor; null: the one whose teacher has a text tower
    text: str | None = None  # heat-map: text tower, open_clip:... or transformers:...; null: the adaptor's teacher
    sam: str | None = None  # masks: segment_anything's own file; null: the teacher that the adaptor names
    sam_adaptor: str = "sam"
    boxes: list[list[float]] = field(default_factory=list)  # masks: x0, y0, x1, y1 in pixels; empty: the data's own
    boxes_per_image: int = 4  # masks: the number of the data's own boxes, the largest, that are used


def visualize(
    kind: str,
    models: list[str],
    data: str | None = None,
    recipe: str | Path | None = None,
    output: str | Path = "runs/visualize",
    overrides: list[str] | None = None,
) -> list[Path]:
    """Writes the pictures of one kind and returns their paths.

    Args:
        kind: "features": PCA, teachers beside students; "attention" of the summary tokens; "positions": the position
            table; "heat-map" of texts; "masks" of prompts; or "all" that these models and settings allow (warnings
            name the others).
        models: see `encoder.load_encoder`.
        data: the field `data` of `VisualizeConfig`. Images are scaled and cropped to squares, except for masks.
        recipe: a YAML file of settings.
        output: the folder of the pictures; existing ones are replaced.
        overrides: `key=value`, stronger than the recipe.

    Raises:
        ValueError, OSError: an unknown kind or setting, models or data that cannot be used or do not suit the kind.
    """
    check_pictures(kind, models, recipe, overrides)
    config = load_config(VisualizeConfig, data, recipe, overrides)
    if config.basis not in BASES:
        raise ValueError(f"basis is {config.basis!r}; expected one of {', '.join(BASES)}.")
    output = Path(expand_home(str(output)))
    encoders = [_load(expand_home(spec), config) for spec in models]
    names = [encoder.name for encoder in encoders]
    if len(set(map(slug, names))) < len(names):
        raise ValueError(f"Two models have one name, {', '.join(names)}: give them titles, as TITLE=MODEL.")
    pictures = (
        [] if kind == "positions" else load_pictures(config.data, config.images, config.split, config.image_column)
    )
    if kind != "all":
        return KINDS[kind](encoders, pictures, config, output)
    written: list[Path] = []
    for name, make in KINDS.items():
        try:
            written += make(encoders, pictures, config, output)
        except (ValueError, OSError) as error:
            logger.warning("%s is left out: %s", name, error)
    return written


def _load(spec: str, config: VisualizeConfig) -> VisionEncoder:
    is_student = ModelSpec.parse(spec).is_student
    side = config.image_size if is_student else config.teacher_image_size
    device = Accelerator(mixed_precision="no").device
    return load_encoder(spec, side, config.dtype, device, config.adaptor if is_student else None)


def _features(
    encoders: list[VisionEncoder], pictures: list[Picture], config: VisualizeConfig, output: Path
) -> list[Path]:
    images = {encoder.name: _squares(encoder, pictures) for encoder in encoders}
    if config.basis == "models":
        columns, basis_of = common_columns(encoders, images)
    else:
        columns, basis_of = own_columns(encoders, images), {}
    shown, path = torch.stack(_shown(pictures)), output / "features.png"
    return [teacher_student_figure(shown, columns, path, basis_of=basis_of, basis_per_image=config.basis == "image")]


def _attention(
    encoders: list[VisionEncoder], pictures: list[Picture], config: VisualizeConfig, output: Path
) -> list[Path]:
    paths = []
    for encoder in _students(encoders, "attention"):
        attention = summary_attention(
            encoder.model, _squares(encoder, pictures), config.layer
        )  # (B, cls, heads, h, w)
        tokens, heads = attention.shape[1:3]
        depth = encoder.model.config.num_hidden_layers
        block = f"block {config.layer % depth + 1} of {depth}"
        if config.heads:
            if not 0 <= config.token < tokens:
                raise ValueError(f"token is {config.token}; {encoder.name} has the class tokens 0 to {tokens - 1}.")
            maps, titles = attention[:, config.token], [f"Head {number + 1}" for number in range(heads)]
            block += f", token {config.token}" if tokens > 1 else ""
        else:
            maps = attention.mean(dim=2)
            titles = [_token_title(encoder.model, number) for number in range(tokens)]
            block += f", {heads} heads"
        path = output / f"attention.{slug(encoder.name)}.png"
        paths.append(attention_figure(torch.stack(_shown(pictures)), maps, path, titles, block))
    return paths


def _token_title(model: RadioModel, token: int) -> str:
    """A name for a class token; with several tokens, the adaptors whose summaries it makes are added."""
    if model.config.num_cls_tokens == 1:
        return "Summary token"
    readers = [
        name
        for name, one in model.config.adaptors.items()
        if one["summary_token"] == token and one["summary_dim"] is not None
    ]
    return f"Token {token}" + (f" ({', '.join(readers)})" if readers else "")


def _positions(encoders: list[VisionEncoder], _: list[Picture], config: VisualizeConfig, output: Path) -> list[Path]:
    students = _students(encoders, "the position table")
    return [positions_figure({encoder.name: encoder.model for encoder in students}, output / "positions.png")]


def _heat_map(
    encoders: list[VisionEncoder], pictures: list[Picture], config: VisualizeConfig, output: Path
) -> list[Path]:
    if not config.prompts:
        raise ValueError('There is no text to look for: give some, as prompts=["a photo of a cat"].')
    paths = []
    for encoder in encoders:
        images = _squares(encoder, pictures)
        tower = load_text_tower(config.text or encoder.text_tower()).to(images.device)
        similarity = text_similarity(encoder, images, config.prompts, tower)
        path = output / f"heat-map.{slug(encoder.name)}.png"
        paths.append(heat_map_figure(torch.stack(_shown(pictures)), similarity, config.prompts, path))
    return paths


def _masks(
    encoders: list[VisionEncoder], pictures: list[Picture], config: VisualizeConfig, output: Path
) -> list[Path]:
    students = _students(encoders, "prompted masks")
    sam_path = config.sam
    for encoder in [*encoders, *students]:
        if sam_path is None and encoder.spec.kind == "segment_anything":
            sam_path = encoder.spec.checkpoint
        if sam_path is None and encoder.is_student and config.sam_adaptor in encoder.model.config.adaptors:
            kind, _, checkpoint = encoder.model.config.adaptors[config.sam_adaptor]["teacher"].partition(":")
            sam_path = checkpoint if kind == "segment_anything" else None
    if sam_path is None:
        raise ValueError(f"No student names the SAM behind its adaptor {config.sam_adaptor!r}: give it, as sam=FILE.")
    boxes = [
        np.array(config.boxes or picture.boxes[: config.boxes_per_image], dtype=np.float64).reshape(-1, 4)
        for picture in pictures
    ]
    bare = [picture.name for picture, ones in zip(pictures, boxes, strict=True) if not len(ones)]
    if bare:
        raise ValueError(f"The data has no boxes for {bare[0]}: give some, as boxes=[[x0,y0,x1,y1],...] in pixels.")
    sam = load_sam(sam_path).to(Accelerator(mixed_precision="no").device)
    # SAM's own size for all by default, so that students see what SAM sees
    student_encoders = {
        encoder.name: StudentEncoder(encoder.model.float(), sam, config.sam_adaptor, config.image_size)
        for encoder in students
    }
    images = [pil_to_tensor(picture.image) for picture in pictures]  # (3, H, W)
    return [masks_figure(images, boxes, sam, student_encoders, output / "masks.png")]


KINDS: dict[str, Callable[..., list[Path]]] = {
    "features": _features,
    "attention": _attention,
    "positions": _positions,
    "heat-map": _heat_map,
    "masks": _masks,
}


def _students(encoders: list[VisionEncoder], what: str) -> list[VisionEncoder]:
    students = [encoder for encoder in encoders if encoder.is_student]
    if not students:
        raise ValueError(f"{what} can be shown of students only: name one with --model.")
    return students


def _squares(encoder: VisionEncoder, pictures: list[Picture]) -> torch.Tensor:
    """float (N, 3, image_size, image_size) in [0, 1]: scaled until they cover the square, the center cut out."""
    side = encoder.image_size
    images = torch.stack([cover_image(picture.image, (side, side)) for picture in pictures])
    return images.float().div(255).to(next(encoder.model.parameters()).device)


def _shown(pictures: list[Picture]) -> list[torch.Tensor]:
    """The same squares to look at, uint8 (3, side, side): as large as the largest image allows."""
    side = min(MAX_SHOWN, max(min(picture.image.size) for picture in pictures))
    return [cover_image(picture.image, (side, side)) for picture in pictures]
