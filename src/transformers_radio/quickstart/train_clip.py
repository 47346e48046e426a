"""The small CLIP of the quickstart: open_clip's own model, loss and file format, trained on the scenes' captions."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .scenes import CLASS_NAMES, MATERIALS, SHAPES
from .teacher_data import MEAN, STD, Split, jitter, normalize, random_crops, sincos_positions, train_steps

SIDE = 64  # pixels; 16 patches and the class token
CONTEXT = 28  # tokens; the longest caption has 25
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "there is a {}")
WORDS = tuple("a an the photo picture of there is in front with that covers and ,".split())
VOCABULARY = ("<pad>", "<unknown>", "<start>", *WORDS, *MATERIALS, *SHAPES, "<end>")  # <end> last: pooling is argmax
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIDE,
        "patch_size": 16,
        "width": 192,
        "layers": 4,
        "head_width": 64,
        "mlp_ratio": 3.5,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(VOCABULARY),
        "width": 64,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "tokenizer.json",
    },
}


def write_tokenizer(directory: Path) -> None:
    """Writes a word-level tokenizer that knows the captions' words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(word, VOCABULARY.index(word)) for word in ("<start>", "<end>")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unknown>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(directory)


def train_clip(directory: Path, data: Split, steps: int = 1400, seed: int = 0) -> dict[str, Any]:
    """Trains on image-caption pairs and writes open_clip_config.json, open_clip_model.safetensors and the tokenizer.

    A batch holds each main class once: short captions repeat, and a repeated caption would be its own negative.

    Returns:
        What was done: steps, images seen, seconds, the last loss.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bilinear"}}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    tokens = tokenizer(data.captions)  # (N, CONTEXT)
    members = [torch.nonzero(data.classes == c)[:, 0] for c in range(len(CLASS_NAMES))]

    model = open_clip.CLIP(**MODEL)
    with torch.no_grad():
        model.visual.positional_embedding[1:] = sincos_positions(SIDE // 16, MODEL["vision_cfg"]["width"])
    contrastive = open_clip.ClipLoss()
    started = time.monotonic()
    for _, update in train_steps("clip", model, steps, peak=1.5e-3):
        chosen = torch.stack([one[int(rng.integers(len(one)))] for one in members])
        images = jitter(normalize(random_crops(data.images[chosen], SIDE, (0.7, 1.0), rng), SIDE), rng)
        with torch.autocast("cpu", torch.bfloat16):
            image_features, text_features, scale = model(images, tokens[chosen])
        loss = contrastive(image_features.float(), text_features.float(), scale.float())
        update(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "open_clip_model.safetensors", metadata={"format": "pt"})
    seconds = round(time.monotonic() - started)
    return {"steps": steps, "images_seen": steps * len(members), "seconds": seconds, "loss": round(loss.item(), 4)}
