"""Students swapped into transformers' LLaVAs, and the tower of the original code base, against the students alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from helpers.tiny_llava import tiny_tokenizer
from helpers.tiny_students import one_size_student, tiny_student
from transformers_radio.integrations import llava_processor, llava_vision_tower, swap_vision_tower
from transformers_radio.modeling import RadioModel, RadioVisionTower

KINDS = ("radio", "eradio", "radio_timm")
SIDE = 96
IMAGE, VIDEO = "<image>", "<video>"


def tokenizer():
    found = tiny_tokenizer()
    found.add_special_tokens({"additional_special_tokens": [IMAGE, VIDEO], "pad_token": "<unk>"})
    return found


def tiny_llava(family):
    """A LLaVA of transformers with its own kind of tower, at 28 pixels in patches of 14, and its processor."""
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": len(words), "pad_token_id": 0}
    vision = {**sizes, "hidden_size": 16, "image_size": 28, "patch_size": 14}
    image, video = (words.convert_tokens_to_ids(token) for token in (IMAGE, VIDEO))
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    if family == "llava":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_index=image
        )
        processor = LlavaProcessor(CLIPImageProcessor(), words, chat_template="{{ messages }}", image_token=IMAGE)
        return LlavaForConditionalGeneration(config).eval(), processor
    if family == "next":
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**text),
            image_token_index=image,
            image_grid_pinpoints=pinpoints,
        )
        images = LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        )
        processor = LlavaNextProcessor(
            images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        return LlavaNextForConditionalGeneration(config).eval(), processor
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**text),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    square = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        words,
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config).eval(), processor


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llava", "next", "onevision"])
def test_a_llava_with_a_student_generates_saves_and_reopens(tmp_path, family, kind):
    llava, old_processor = tiny_llava(family)
    student = tiny_student(kind)
    language = llava.lm_head.weight.clone()
    assert swap_vision_tower(llava, student, SIDE) is llava
    processor = llava_processor(llava, old_processor)

    width = student.config.hidden_size
    assert llava.model.multi_modal_projector.linear_1.in_features == width == llava.config.vision_config.hidden_size
    assert torch.equal(llava.lm_head.weight, language)
    images = [picture(60, 130), picture(130, 60, seed=1)]
    text = [f"USER: {IMAGE}\nWhat color is the shape?", f"USER: {IMAGE} Where is the shape?"]
    inputs = processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")
    pixels = inputs["pixel_values"]
    assert 0 <= pixels.min() and pixels.max() <= 1 and pixels.max() > 0.9  # the student normalizes them
    with torch.no_grad():
        logits = llava(**inputs).logits  # raises unless there are as many image tokens as features
    expected = student(pixels.flatten(0, -4)[:1], adaptors=[]).features  # of the first image or tile
    seen = []
    llava.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        generated = llava.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape == (2, inputs["input_ids"].shape[1] + 2)
    if family == "llava":  # without the padding of the batch: the first image is landscape
        sizes = inputs["image_sizes"].tolist()
        assert sizes[0][1] == SIDE and sizes[0][0] < SIDE and sizes[1][0] == SIDE
        tokens = sum(height * width for height, width in sizes) // student.patch_size**2
        assert (inputs["input_ids"] == llava.config.image_token_id).sum() == tokens
        expected = student(pixels[:1, :, : sizes[0][0], : sizes[0][1]], adaptors=[]).features
    torch.testing.assert_close(seen[0][:1, : expected.shape[1]], expected, atol=1e-5, rtol=1e-4)

    llava.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = type(llava).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again_inputs = type(processor).from_pretrained(tmp_path)(
        images=images, text=text, padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**again_inputs).logits, logits)


def test_onevision_sees_videos_and_several_images(tmp_path):
    llava, processor = tiny_llava("onevision")
    swap_vision_tower(llava, tiny_student("radio"), SIDE)
    processor = llava_processor(llava, processor)
    video = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    inputs = processor(videos=[video], text=[f"USER: {VIDEO} What"], return_tensors="pt")
    assert (inputs["input_ids"] == llava.config.video_token_id).sum() == 3 * (6 // 2) ** 2 + 1
    assert inputs["pixel_values_videos"].min() >= 0 and inputs["pixel_values_videos"].max() <= 1
    assert llava(**inputs).logits.isfinite().all()
    inputs = processor(
        images=[[picture(40, 50), picture(50, 40)]], text=[f"{IMAGE} {IMAGE} What"], return_tensors="pt"
    )
    assert llava(**inputs).logits.isfinite().all()


def test_a_swapped_llava_learns_and_its_student_is_a_copy(tmp_path):
    llava, processor = tiny_llava("llava")
    tiny_student("radio").save_pretrained(tmp_path)
    student = RadioModel.from_pretrained(tmp_path)
    swap_vision_tower(llava, str(tmp_path), SIDE)  # by its folder
    inputs = llava_processor(llava, processor)(images=picture(96, 96), text=IMAGE + " red", return_tensors="pt")
    assert torch.equal(
        llava.model.vision_tower.model(inputs["pixel_values"]).features,
        student.eval()(inputs["pixel_values"]).features,
    )
    llava.model.vision_tower.requires_grad_(False)
    llava.train()
    optimizer = torch.optim.AdamW([one for one in llava.parameters() if one.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = llava(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_what_cannot_be_swapped_is_named():
    llava, processor = tiny_llava("llava")
    with pytest.raises(ValueError, match="llava is .*; a student can be the tower of LlavaForConditionalGeneration"):
        swap_vision_tower(torch.nn.Linear(2, 2), tiny_student("radio"))
    with pytest.raises(ValueError, match="swap a student in first"):
        llava_processor(llava, processor)
    with pytest.raises(ValueError, match="image_size is 100; the student takes multiples of 16"):
        swap_vision_tower(llava, tiny_student("radio"), 100)
    with pytest.raises(ValueError, match="image_size is 64; the student takes multiples of 32, such as 32"):
        swap_vision_tower(llava, one_size_student(), 64)
    with pytest.raises((OSError, ValueError), match="no/such/folder"):
        swap_vision_tower(llava, "no/such/folder")
    llava_next = swap_vision_tower(tiny_llava("next")[0], tiny_student("radio"), SIDE)
    with pytest.raises(ValueError, match="a LlavaNextForConditionalGeneration has a LlavaNextProcessor"):
        llava_processor(llava_next, processor)


# --- the original code base ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_student(request.param).save_pretrained(path)
    return path


def test_the_tower_of_the_original_code_base_has_its_interface(folder):
    tower = llava_vision_tower(str(folder), args=SimpleNamespace(mm_vision_select_layer=-1), image_size=SIDE)
    student = tower.vision_tower.model
    assert tower.is_loaded and tower.vision_tower_name == str(folder)
    assert (tower.select_layer, tower.select_feature) == (-1, "patch")
    assert tower.hidden_size == student.config.hidden_size
    per_side = SIDE // student.patch_size
    assert (tower.num_patches_per_side, tower.num_patches) == (per_side, per_side**2)
    assert tower.config.image_size == SIDE and tower.dtype == torch.float32 and tower.device.type == "cpu"
    assert tower.dummy_feature.shape == (1, tower.hidden_size) and not tower.dummy_feature.any()
    assert not any(parameter.requires_grad for parameter in tower.parameters())

    processor = tower.image_processor
    assert processor.crop_size["height"] == SIDE and processor.size["shortest_edge"] == SIDE
    assert tuple(int(255 * mean) for mean in processor.image_mean)  # the padding color of `expand2square`
    pixels = processor.preprocess(picture(120, 200), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE) and 0 <= pixels.min() and 0.9 < pixels.max() <= 1

    features = tower(pixels.repeat(2, 1, 1, 1))
    assert features.shape == (2, tower.num_patches, tower.hidden_size)
    torch.testing.assert_close(features[:1], student(pixels, adaptors=[]).features)
    as_list = tower([pixels[0], pixels[0]])
    assert [one.shape for one in as_list] == [(1, tower.num_patches, tower.hidden_size)] * 2
    torch.testing.assert_close(as_list[1], features[:1], atol=1e-5, rtol=1e-4)
    assert tower(pixels.to(torch.bfloat16)).dtype == torch.bfloat16  # as the images

    tower.load_model()  # again: nothing happens
    assert tower.vision_tower.model is student
    with_summary = SimpleNamespace(mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch")
    tower = llava_vision_tower(str(folder), args=with_summary, image_size=SIDE)
    assert tower(pixels).shape == (1, 1 + tower.num_patches, tower.hidden_size)


def test_delayed_loading_and_training(folder):
    tower = llava_vision_tower(str(folder), delay_load=True, image_size=SIDE)
    assert not tower.is_loaded and not list(tower.parameters())
    assert tower.hidden_size == tower.config.hidden_size and tower.num_patches == tower.num_patches_per_side**2
    tower.load_model(device_map=None)
    assert tower.is_loaded
    tower.vision_tower.requires_grad_(True)
    tower.train()
    tower(torch.rand(2, 3, SIDE, SIDE)).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())
    trained = SimpleNamespace(unfreeze_mm_vision_tower=True)
    assert llava_vision_tower(str(folder), args=trained, delay_load=True).is_loaded


def test_a_chosen_layer_of_the_original_tower(tmp_path):
    student = tiny_student("radio")
    student.save_pretrained(tmp_path)
    tower = llava_vision_tower(str(tmp_path), SimpleNamespace(mm_vision_select_layer=-2), image_size=SIDE)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    expected = student(pixels, output_hidden_states=True).hidden_states[-2][:, 4:]
    torch.testing.assert_close(tower(pixels), expected)


def test_wrong_folders_and_arguments_of_the_original_tower(tmp_path, folder):
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type"):
        llava_vision_tower(str(tmp_path))
    with pytest.raises(ValueError, match="mm_vision_select_feature is 'all'"):
        llava_vision_tower(str(folder), SimpleNamespace(mm_vision_select_feature="all"))
    with pytest.raises(ValueError, match="image_size is 100"):
        llava_vision_tower(str(folder), image_size=100)
    tiny_student("eradio").save_pretrained(tmp_path / "eradio")
    with pytest.raises(ValueError, match="mm_vision_select_layer is -2, expected a number from -1 to 0 .* eradio"):
        llava_vision_tower(str(tmp_path / "eradio"), SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)


def test_the_towers_class_opens_every_kind_of_student(folder):
    assert RadioVisionTower.from_pretrained(folder).config.radio_config.adaptors == {}
