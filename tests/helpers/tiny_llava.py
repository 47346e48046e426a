"""A made set of questions about images, in LLaVA's formats, and a tiny student and language model to answer it.

Each image shows one colored shape on noise, at one of four places, in one of several aspect ratios; colors and
places are drawn alike and apart, so neither the question nor the other answer tells anything.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_radio import RadioConfig, RadioModel
from transformers_radio.evaluation.llava.model import CHAT_TEMPLATE

COLORS = {"red": (220, 30, 30), "green": (30, 190, 30), "blue": (40, 40, 230), "yellow": (230, 220, 40)}
PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
SIZES = [(64, 64), (96, 72), (72, 96), (64, 48), (40, 64)]  # (width, height)
QUESTIONS = {"What color is the shape?": "color", "Where is the shape?": "place"}
IMAGE_SIZE = 64


def draw(generator: np.random.Generator, path: Path) -> dict[str, str]:
    """A new image at `path`; {"color": ..., "place": ...} is what it shows."""
    color = str(generator.choice(list(COLORS)))
    place = str(generator.choice(list(PLACES)))
    width, height = SIZES[generator.integers(len(SIZES))]
    pixels = generator.normal(128, 10, (height, width, 3))
    x, y = PLACES[place][0] * width, PLACES[place][1] * height
    rows, columns = np.mgrid[:height, :width]
    radius = 0.3 * min(width, height)
    inside = (np.abs(columns - x) < radius) & (np.abs(rows - y) < radius)
    pixels[inside] = COLORS[color]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return {"color": color, "place": place}


def make_world(folder: Path, images: int, questions: int, seed: int = 0) -> Path:
    """FOLDER/images/, pretrain.json, finetune.json and questions.jsonl, the questions about images of their own."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(seed)
    pretrain, finetune, asked = [], [], []
    for number in range(images + questions):
        file = f"{number:05d}.png"
        shown = draw(generator, folder / "images" / file)
        if number >= images:
            for text, kind in QUESTIONS.items():
                item = {"question_id": f"{number}-{kind}", "image": file, "text": text, "answer": shown[kind]}
                asked.append(item)
            continue
        caption = f"a {shown['color']} shape at the {shown['place']}"
        turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": caption}]
        pretrain.append({"id": number, "image": file, "conversations": turns})
        turns = []
        for text in generator.permutation(list(QUESTIONS)).tolist():
            prompt = f"{text}\nAnswer the question using a single word or phrase."
            turns.append({"from": "human", "value": prompt if turns else f"<image>\n{prompt}"})
            turns.append({"from": "gpt", "value": shown[QUESTIONS[text]]})
        finetune.append({"id": number, "image": file, "conversations": turns})
    (folder / "pretrain.json").write_text(json.dumps(pretrain))
    (folder / "finetune.json").write_text(json.dumps(finetune))
    (folder / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in asked))
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> before each text, as a Llama's."""
    texts = [CHAT_TEMPLATE, *QUESTIONS, "Answer the question using a single word or phrase.", "USER: ASSISTANT:"]
    texts += [f" {word}" for word in (*COLORS, *PLACES)] + ["a red shape at the left"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_language_model(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_student(folder: Path) -> Path:
    torch.manual_seed(0)
    config = RadioConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2.0,
        max_img_size=128,
        num_cls_tokens=2,
        num_registers=2,
        summary_idxs=[0, 1],
    )
    student = RadioModel(config)
    with torch.no_grad():
        student.embeddings.position_embedding.mul_(8)  # so that untrained patch tokens tell where they are
    student.save_pretrained(folder)
    return folder


def settings(world: Path, folder: Path, **overrides) -> list[str]:
    """`key=value` for the command line."""
    values = {
        "name": "made",
        "language_model": folder,
        "image_size": IMAGE_SIZE,
        "pretrain.conversations": "pretrain.json",
        "pretrain.images": "images",
        "pretrain.learning_rate": 2e-3,
        "pretrain.batch_size": 16,
        "finetune.conversations": "finetune.json",
        "finetune.images": "images",
        "finetune.learning_rate": 2e-3,
        "finetune.batch_size": 16,
        "questions.made.questions": "questions.jsonl",
        "questions.made.images": "images",
        "hardware.bf16": "false",
        "hardware.gradient_checkpointing": "false",
        "hardware.num_workers": 0,
        **overrides,
    }
    return [f"data={world}", *(f"{key}={value}" for key, value in values.items())]
