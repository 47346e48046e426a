"""Tiny models with text towers, in the files that OpenCLIP and transformers write."""

import json

import open_clip
import torch
from transformers import Siglip2Tokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

LETTERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz.!_"]
LENGTH = 24  # of SigLIP's texts


def randomize(model, seed=2):
    """Fresh weights hardly look at their input."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


def write_siglip(folder, projection=24):
    """A SigLIP2 of one resolution, as its checkpoints are: SigLIP's classes, SigLIP2's tokenizer."""
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(LETTERS), "max_position_embeddings": LENGTH, "projection_size": projection}
    text |= {"bos_token_id": 2, "eos_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
    model = randomize(SiglipModel(config))
    model.save_pretrained(folder)
    SiglipImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    Siglip2Tokenizer(vocabulary, [], add_bos_token=False, add_eos_token=True).save_pretrained(folder)
    return model


@torch.no_grad()
def siglip_embeddings(model, texts):
    """(n, D) of canonical texts, their letters numbered by hand as SigLIP2 reads them."""
    rows = []
    for text in texts:
        ids = [LETTERS.index("▁" if letter == " " else letter) for letter in text][: LENGTH - 1] + [1]
        rows.append(ids + [0] * (LENGTH - len(ids)))
    return model.get_text_features(input_ids=torch.tensor(rows)).pooler_output


def write_open_clip(folder, name, embed_dim):
    """A CLIP that OpenCLIP knows as `name` from now on, and the path of its weights, OpenCLIP's own file."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = {"width": 32, "layers": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8, "head_width": 16}
    config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": {**tower, "heads": 2, "context_length": 16}}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    model = randomize(open_clip.create_model(name))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model, folder / "open_clip_pytorch_model.bin"
