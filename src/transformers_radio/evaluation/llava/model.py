"""transformers' LLaVA with a RADIO student as its vision tower (paper, section 5.4), and the processor for it."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from transformers_radio.modeling import RadioImageProcessor, RadioLlavaProcessor, RadioModel, RadioVisionTower

IMAGE_TOKEN = "<image>"

# The conversation format of Vicuna 1.1, in which LLaVA-1.5 is tuned and asked. A question ends with the beginning of
# the reply, so a prompt for generation is simply a conversation that ends with a question.
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def build_llava(
    student: RadioModel, language_model: str, image_size: int, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, RadioLlavaProcessor]:
    """A LLaVA-1.5 with a fresh two-layer projector; its tower is frozen.

    The language model reads the patch tokens of the student's last layer, without class or register tokens.

    Args:
        student: a copy of its backbone becomes the tower.
        language_model: folder or Hub id of a causal language model with a fast tokenizer.
        image_size: the longest side in pixels; the aspect ratio stays, and the shorter side is padded to the next
            multiple of the student's step.

    Raises:
        ValueError: a size that the student does not take, or a tokenizer without offsets or end of sequence.
        OSError: no such language model.
    """
    check_image_size(student, image_size)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    check_tokenizer(tokenizer, language_model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE

    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    if len(tokenizer) > language.config.vocab_size:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tower = RadioVisionTower.from_radio(student, image_size)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # only the frame: its parts are put in below
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = tower.requires_grad_(False).to(dtype)
    llava.model.language_model = language.base_model
    llava.lm_head = language.get_output_embeddings()
    llava.model.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype)
    llava.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = RadioLlavaProcessor(
        RadioImageProcessor(size={"longest_edge": image_size}, size_divisor=student.min_resolution_step),
        tokenizer,
        patch_size=student.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's summary token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )
    return llava, processor


def load_llava(
    folder: str, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, RadioLlavaProcessor]:
    """A saved LLaVA with its processor, in eval mode; the tower is frozen.

    Raises:
        ValueError: a LLaVA with another vision tower.
        OSError: no such folder.
    """
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    tower = llava.model.vision_tower
    if not isinstance(tower, RadioVisionTower):
        raise ValueError(
            f"{folder} has a {type(tower).__name__} as vision tower; expected a LLaVA that was trained with a student."
        )
    tower.requires_grad_(False)
    return llava.eval(), RadioLlavaProcessor.from_pretrained(folder)


def check_image_size(student: RadioModel, image_size: int) -> None:
    """ValueError unless the student takes images with this longest side."""
    step = student.min_resolution_step
    nearest, _ = student.get_nearest_supported_resolution(image_size, image_size)
    if image_size != nearest:
        raise ValueError(f"image_size is {image_size}; the student takes multiples of {step}, such as {nearest}.")


def check_tokenizer(tokenizer, name: str) -> None:
    """ValueError unless the tokenizer can tell which tokens belong to an answer, and where an answer ends."""
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {name} has no offsets: use a model with a fast one (tokenizer.json).")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {name} has no eos_token, so no answer would end: give it one.")
