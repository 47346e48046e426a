"""LLaVA's conversations as training examples: tokens, labels on the answers alone, and the image at its own aspect."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlavaProcessor

from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb
from transformers_radio.disk import digest

from .model import IMAGE_TOKEN

logger = logging.getLogger(__name__)

IGNORED = -100  # label that the loss leaves out
ROLES = {"human": "user", "gpt": "assistant"}
Messages = list[dict[str, str]]


@dataclass
class Example:
    """A conversation: `messages` alternate from "user" to "assistant"; with an image the first begins with <image>."""

    messages: Messages
    image: Path | None


@dataclass
class Conversations:
    """The examples of a file."""

    examples: list[Example]  # without those whose image is missing
    missing: int  # number of missing images
    digest: str  # hash of the file's bytes


def read_conversations(path: str | Path, images: str | Path, max_skipped_share: float) -> Conversations:
    """Read a file in LLaVA's format: a JSON list of {"image": path below `images`, "conversations": [{"from": "human",
    "value": ...}, {"from": "gpt", "value": ...}, ...]}; items without "image" are text alone.

    As in LLaVA, the image token goes to the front of the first question, and turns before the first question go.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another format (the message names the item), or more missing images than `max_skipped_share`.
    """
    path, images = Path(path), Path(images)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of conversations {path}.")
    if not images.is_dir():
        raise FileNotFoundError(f"There is no folder of images {images} (for {path}).")
    data = path.read_bytes()
    try:
        items = json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path} holds no list of conversations; expected [{{'image': ..., 'conversations': ...}}].")
    examples, left_out, missing = [], 0, set()
    for number, item in enumerate(tqdm(items, desc=path.name, unit=" items", leave=False)):
        name = f"item {number} of {path}"
        messages = _read_messages(item, name)
        image = images / item["image"] if item.get("image") else None
        if image is not None and not image.is_file():
            left_out += 1
            missing.add(image)
            if left_out <= 3:
                logger.warning("%s: there is no image %s; the item is left out", name, image)
            continue
        examples.append(Example(messages, image))
    if missing:
        logger.warning("%s: %d of %d items are left out, their images are missing", path, left_out, len(items))
    if left_out > max_skipped_share * len(items) or not examples:
        raise ValueError(
            f"{left_out} of {len(items)} images of {path} are missing below {images}, more than the allowed share of "
            f"{max_skipped_share}: complete the folder, or raise max_skipped_share."
        )
    return Conversations(examples, len(missing), digest([data]))


def _read_messages(item: Any, name: str) -> Messages:
    try:
        turns = [(ROLES[turn["from"]], turn["value"].strip()) for turn in item["conversations"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is not a conversation; expected 'conversations' of {{'from': 'human' or 'gpt', 'value': text}}."
        ) from error
    while turns and turns[0][0] != "user":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not turns or len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"{name} does not alternate between questions and answers; it has {roles}.")
    tokens = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    if tokens != bool(item.get("image")):
        raise ValueError(f"{name} has {tokens} {IMAGE_TOKEN} for {'one image' if item.get('image') else 'no image'}.")
    messages = [{"role": role, "content": text.replace(IMAGE_TOKEN, "").strip()} for role, text in turns]
    if tokens:
        messages[0]["content"] = f"{IMAGE_TOKEN}\n{messages[0]['content']}"
    return messages


class LlavaDataset(Dataset):
    """Examples as {"input_ids" (L,), "labels" (L,), "pixel_values" (3, height, width) or None}.

    The labels are the tokens of the answers and of their ends, and IGNORED elsewhere. An example whose image cannot be
    read is replaced by the next one; the image's path is appended to the file `unreadable`, one per line.

    Args:
        plain: the format of LLaVA's first phase, the image and its caption alone; otherwise the chat template.
        max_length: in tokens, image tokens included; longer examples are cut.

    Raises:
        ValueError: in `__getitem__`, when more than `max_skipped_share` of the images cannot be read (after 100).
    """

    def __init__(
        self,
        examples: list[Example],
        processor: LlavaProcessor,
        plain: bool,
        max_length: int,
        unreadable: Path,
        max_skipped_share: float,
    ):
        self.examples, self.processor, self.plain, self.max_length = examples, processor, plain, max_length
        self.unreadable, self.max_skipped_share = unreadable, max_skipped_share
        self.seen = self.skipped = 0  # by this process

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | None]:
        for step in range(len(self.examples)):
            example = self.examples[(index + step) % len(self.examples)]
            if example.image is None:
                return self._encode(example, None)
            self.seen += 1
            try:
                return self._encode(example, encode_image(self.processor, read_rgb(example.image)))
            except SkippedImage as error:
                self._skip(example.image, error.reason)
        raise ValueError("No image of the conversations can be read.")

    def _skip(self, image: Path, reason: str) -> None:
        self.skipped += 1
        logger.warning("%s cannot be read (%s); the next example takes its place", image, reason)
        with self.unreadable.open("a", encoding="utf-8") as file:
            file.write(f"{image}\n")
        if self.seen >= 100 and self.skipped > self.max_skipped_share * self.seen:
            raise ValueError(
                f"{self.skipped} of {self.seen} images cannot be read, more than the allowed share of "
                f"{self.max_skipped_share}; the last is {image} ({reason}). Repair them, or raise max_skipped_share."
            )

    def _encode(self, example: Example, pixel_values: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        messages = example.messages
        tokenizer = self.processor.tokenizer
        if self.plain:
            prompt = IMAGE_TOKEN if pixel_values is not None else ""
            text = f"{prompt}{messages[1]['content']}\n"
            answers = [(len(prompt), len(text))]
        else:
            text, answers = "", []
            for turn in range(0, len(messages), 2):
                prompt, text = (render(tokenizer, messages[:end]) for end in (turn + 1, turn + 2))
                answers.append((len(prompt), len(text)))
        expanded = expand_image_token(self.processor, text, pixel_values)
        grown = len(expanded) - len(text)  # the image stands before all answers
        encoded = tokenizer(expanded, return_offsets_mapping=True, truncation=True, max_length=self.max_length)
        input_ids = torch.tensor(encoded["input_ids"])
        if (input_ids == self.processor.image_token_id).sum() != expanded.count(IMAGE_TOKEN):
            raise ValueError(
                f"max_length {self.max_length} cuts into the {expanded.count(IMAGE_TOKEN)} image tokens of "
                f"{example.image}: raise it, or lower image_size."
            )
        labels = torch.full_like(input_ids, IGNORED)
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            if start < end and any(first + grown <= start and end <= last + grown for first, last in answers):
                labels[position] = input_ids[position]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


def encode_image(processor: LlavaProcessor, image: Image.Image) -> torch.Tensor:
    """Pixels in [0, 1], (3, height, width): the longest side fixed, the shorter one padded to the student's step."""
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def render(tokenizer, messages: Messages) -> str:
    """A conversation, or a question that waits for its answer, as text."""
    return tokenizer.apply_chat_template(messages, tokenize=False)


def expand_image_token(processor: LlavaProcessor, text: str, pixel_values: torch.Tensor | None) -> str:
    """The text with one image token per patch, as LLaVA's processor does for an image (3, height, width)."""
    if pixel_values is None:
        return text
    rows, columns = (side // processor.patch_size for side in pixel_values.shape[1:])
    return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (rows * columns))


class LlavaCollator:
    """Batches examples of different lengths and image sizes.

    input_ids, attention_mask, labels: (B, L), padded at `padding_side`. pixel_values: (N, 3, H, W), the N images at
    the top left; image_sizes: (N, 2), their (height, width).
    """

    def __init__(self, processor: LlavaProcessor, padding_side: str = "right"):
        self.processor, self.padding_side = processor, padding_side

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [feature["pixel_values"] for feature in features if feature["pixel_values"] is not None]
        rows = [
            {"input_ids": f["input_ids"], "labels": f["labels"], "attention_mask": torch.ones_like(f["input_ids"])}
            for f in features
        ]
        if not images:
            # text alone: one black image outside of the attention and the loss, so that every process of a run has
            # gradients for the projector; with DDP and FSDP all would wait for the one that has none
            step = self.processor.image_processor.size_divisor
            images = [torch.zeros(3, step, step)]
            tokens = torch.full(((step // self.processor.patch_size) ** 2,), self.processor.image_token_id)
            extra = {"input_ids": tokens, "labels": torch.full_like(tokens, IGNORED)}
            extra["attention_mask"] = torch.zeros_like(tokens)
            parts = (extra, rows[0]) if self.padding_side == "left" else (rows[0], extra)
            rows[0] = {name: torch.cat([part[name] for part in parts]) for name in extra}
        fills = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "labels": IGNORED,
            "attention_mask": 0,
        }
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fill, padding_side=self.padding_side
            )
            for name, fill in fills.items()
        }
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch["pixel_values"] = torch.stack(
            [
                torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
                for image in images
            ]
        )
        batch["image_sizes"] = torch.tensor([image.shape[1:] for image in images])
        return batch
