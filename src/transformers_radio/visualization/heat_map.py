"""Where a text is in an image: the cosine similarity of each patch to the text, without any training for it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from transformers_radio.evaluation.classification.zero_shot import zero_shot_classifier
from transformers_radio.evaluation.models.encoder import VisionEncoder
from transformers_radio.evaluation.segmentation.words import PatchProjection, TextHead, summary_head_patches

from .panels import Column, heat, photographs, write_panels


@torch.no_grad()
def text_similarity(
    encoder: VisionEncoder,
    images: torch.Tensor,
    prompts: Sequence[str],
    encode_text: Callable[[list[str]], torch.Tensor],
) -> torch.Tensor:
    """Cosine similarity of each patch to each prompt: float32 (B, prompts, h, w) in [-1, 1], on the CPU.

    A student's patch tokens pass the summary head of its language adaptor; an OpenCLIP teacher's its own final norm
    and projection. Neither was trained on patches, so what counts is where a map is highest, not how high it is.

    Args:
        encoder: a student with a language adaptor, or an OpenCLIP teacher.
        images: float (B, 3, H, W) in [0, 1].
        prompts: texts as they are; a class's name does better in a sentence, "a photo of a cat".
        encode_text: the text tower of `encoder.text_tower()`: texts -> (N, D).

    Raises:
        ValueError: no prompt, a model without a text tower, or a text tower of another width.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"prompts is {list(prompts)}; expected at least one text, none of them empty.")
    device = images.device
    if encoder.is_student:
        if encoder.adaptor is None:
            encoder.text_tower()  # raises, and says what is missing
        encode = summary_head_patches(encoder.model, str(encoder.adaptor))
    else:
        if encoder.spec.kind != "open_clip":
            raise ValueError(
                f"{encoder.name} is neither a student nor an OpenCLIP teacher: only their patches compare with texts."
            )
        project = PatchProjection(encoder.spec.checkpoint).to(device)

        def encode(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
            features, grid = encoder.features(images)
            return project(features), grid

    head = TextHead(zero_shot_classifier(encode_text, list(prompts), [str])).to(device)
    maps = []
    for image in tqdm(images, desc=f"{encoder.name} heat maps", unit="image"):
        pixel_values = image[None].to(encoder.model.dtype) if encoder.is_student else image[None]
        embeddings, grid = encode(pixel_values)
        # (1, h*w, D) -> (1, D, h*w) -> (1, D, h, w) -> (prompts, h, w)
        maps.append(head(embeddings.float().transpose(1, 2).unflatten(2, grid))[0].cpu())
    return torch.stack(maps)


def heat_map_figure(images: torch.Tensor, similarity: torch.Tensor, prompts: Sequence[str], path: str | Path) -> Path:
    """Writes a PNG: a row per image; the input, then the similarity to each prompt over it, patch by patch.

    A prompt's colors span its lowest to its highest similarity over all the images, so that an image without the thing
    stays dark. Both numbers stand above the column.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1].
        similarity: (N, prompts, h, w) from `text_similarity`.
    """
    shown = [photographs(list(images))]
    for number, prompt in enumerate(prompts):
        maps = similarity[:, number]
        low, high = (value.item() for value in maps.aminmax())
        panels = [heat(one, low, high, image) for one, image in zip(maps, images, strict=True)]
        grid = f"{maps.shape[2]} × {maps.shape[1]} patches"
        shown.append(Column(prompt, f"cosine {low:.2f} to {high:.2f}\n{grid}", panels, smooth=True))
    return write_panels(shown, path)
